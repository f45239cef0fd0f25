use qcow2_image::copy::{CopyError, CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_io::Memory;
use qcow2_io::codec::{Codec, Level};

use crate::rig::{create, open};

fn refused(source: &Memory, target: Target<'_>, options: &CopyOptions<'_>) -> CopyError {
    copy(source, target, options).unwrap_err()
}

#[test]
fn an_image_that_is_too_small_is_refused() {
    let image = open(&create(&CreateOptions::new(1 << 20)));
    let source = Memory::from(vec![1; (1 << 20) + 1]);
    let error = refused(&source, Target::Image(&image), &CopyOptions::new());
    assert_eq!(
        error.to_string(),
        "the source has 1048577 bytes, the target only 1048576"
    );
}

#[test]
fn only_images_are_compressed_and_only_if_they_can_be() {
    let source = Memory::from(vec![1; 1 << 20]);
    let options = CopyOptions::new().compress(Level::default());
    let target = Memory::new();
    let error = refused(&source, Target::Storage(&target), &options);
    assert!(matches!(error, CopyError::NotAnImage), "{error}");

    let image = open(&create(&CreateOptions::new(1 << 20)));
    let level = Level::new(Codec::Zstd, 22).unwrap();
    let options = CopyOptions::new().compress(level);
    let error = refused(&source, Target::Image(&image), &options);
    let CopyError::Target { offset: 0, .. } = error else {
        panic!("{error}");
    };
}

#[cfg(feature = "encryption")]
#[test]
fn encrypted_images_are_not_compressed() {
    let memory = create(&crate::rig::luks(CreateOptions::new(1 << 20)));
    let image = crate::rig::options().secret(crate::rig::secret());
    let image = image.open(memory).unwrap();
    let options = CopyOptions::new().compress(Level::default());
    let error = refused(&Memory::new(), Target::Image(&image), &options);
    let CopyError::Target { source, .. } = error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("encrypted"), "{source}");
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    let (source, target) = (Memory::from(vec![1; 10]), Memory::new());
    let new = CopyOptions::new;
    for options in [
        new().chunk(0),
        new().chunk((64 << 20) + 1),
        new().sparse(1),
        new().sparse(3 << 10),
        new().sparse(128 << 20),
    ] {
        let error = refused(&source, Target::Storage(&target), &options);
        assert!(matches!(error, CopyError::Option { .. }), "{error}");
    }
    // Any length will do, if it is not too long.
    for options in [new().chunk(1), new().chunk(64 << 20), new().threads(1000)] {
        copy(&source, Target::Storage(&target), &options).unwrap();
        assert_eq!(target.to_vec().unwrap(), [1; 10]);
    }
}
