//! Our side: a process that copies one file to another.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use qcow2_format::header::CompressionType;
use qcow2_image::Image;
use qcow2_image::copy::{CopyOptions, Target, copy};
use qcow2_image::create::CreateOptions;
use qcow2_image::luks::{KeyCost, LuksOptions};
use qcow2_io::cipher::Secret;
use qcow2_io::codec::Codec;
use qcow2_io::{File, FileOptions, Storage};

/// What one of QEMU's `encrypt.iter-time=10` comes to.
const KEY_TIME: Duration = Duration::from_millis(10);

/// Copy a raw file or an image to another
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The source is an image
    #[arg(long)]
    from_image: bool,

    /// The target is an image, compressed with this
    #[arg(long)]
    compress: Option<String>,

    #[arg(long)]
    level: Option<i32>,

    /// The target is an encrypted image
    #[arg(long, requires = "secret_file", conflicts_with = "compress")]
    encrypt: bool,

    /// Holds the secret of the image that has one
    #[arg(long)]
    secret_file: Option<PathBuf>,

    #[arg(long, default_value_t = 0)]
    threads: usize,

    source: PathBuf,
    target: PathBuf,
}

/// Copies.
pub(in crate::bench) fn run(args: &Args) -> Result<ExitCode> {
    let source: Arc<dyn Storage> = if args.from_image {
        let mut options = Image::options().read_only(true);
        if let Some(secret) = args.secret()? {
            options = options.secret(secret);
        }
        Arc::new(options.open_path(&args.source)?)
    } else {
        Arc::new(File::open(&args.source)?)
    };
    let options = CopyOptions::new().threads(args.threads);
    let file = FileOptions::new().write(true).create_new(true);
    let file = file.open(&args.target)?;
    let Some(create) = args.image_options(source.len()?)? else {
        copy(&*source, Target::Storage(&file), &options)?;
        return Ok(ExitCode::SUCCESS);
    };
    Image::create(&file, &create)?;
    let mut open = Image::options();
    if let (true, Some(secret)) = (args.encrypt, args.secret()?) {
        open = open.secret(secret);
    }
    let image = open.open_file(file)?;
    let options = match args.codec()? {
        Some(codec) => options.compress(super::level(args.level, codec)?),
        None => options,
    };
    copy(&*source, &image, &options)?;
    image.close()?;
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn codec(&self) -> Result<Option<Codec>> {
        Ok(match self.compress.as_deref() {
            None => None,
            Some("zlib") => Some(Codec::Zlib),
            Some("zstd") => Some(Codec::Zstd),
            Some(other) => bail!("no codec is called {other}"),
        })
    }

    fn secret(&self) -> Result<Option<Secret>> {
        let file = self.secret_file.as_ref();
        Ok(file.map(Secret::from_file).transpose()?)
    }

    /// What image the target is to be; nothing if it is a raw file.
    fn image_options(&self, len: u64) -> Result<Option<CreateOptions>> {
        let options = CreateOptions::new(len);
        Ok(match (self.codec()?, self.secret()?) {
            (Some(Codec::Zstd), _) => Some(options.compression_type(CompressionType::Zstd)),
            (Some(_), _) => Some(options),
            (None, Some(secret)) if self.encrypt => {
                let luks = LuksOptions::new().cost(KeyCost::Time(KEY_TIME));
                Some(options.luks(luks, secret))
            }
            _ => None,
        })
    }
}
