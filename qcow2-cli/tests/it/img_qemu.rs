//! What `qemu-img` says, and what we say.

use super::beside::{compare, compare_disks, compare_odd_names, is_available, scene};

/// Splits lines at blanks; `''` is an empty word.
fn compare_lines(lines: &[&str]) {
    if !is_available(lines.len(), "command lines of qemu-img") {
        return;
    }
    let split: Vec<Vec<&str>> = lines
        .iter()
        .map(|line| {
            line.split(' ')
                .map(|word| if word == "''" { "" } else { word })
                .collect()
        })
        .collect();
    let words: Vec<&[&str]> = split.iter().map(Vec::as_slice).collect();
    compare("qemu-img", scene().path(), &words);
}

/// The same for what comes of them: the image `x` reads as the real tool's does, and is sound.
fn compare_made(lines: &[&str]) {
    if is_available(lines.len(), "images that qemu-img makes, too") {
        let words: Vec<Vec<&str>> = lines.iter().map(|line| line.split(' ').collect()).collect();
        let words: Vec<&[&str]> = words.iter().map(Vec::as_slice).collect();
        compare_disks(scene().path(), "x", &words);
    }
}

#[test]
fn creation_says_what_it_makes_or_why_not() {
    compare_lines(&[
        "create -f foo a 1M",
        "create -f bochs a 1M",
        "create -f qcow2 a",
        "create -f qcow2 -o foo=bar a 1M",
        "create -f qcow2 -o cluster_size=3k a 1M",
        "create -f qcow2 -o cluster_size=foo a 1M",
        "create -f qcow2 -o lazy_refcounts=foo a 1M",
        "create -f qcow2 -o refcount_bits=foo a 1M",
        "create -f qcow2 -o refcount_bits=-1 a 1M",
        "create -f qcow2 -o refcount_bits=3 a 1M",
        "create -f qcow2 -o compat=0.10,lazy_refcounts=on a 1M",
        "create -f qcow2 -o compat=0.10,refcount_bits=1 a 1M",
        "create -f qcow2 -o compat=0.42 a 1M",
        "create -f qcow2 -o preallocation=1234 a 1M",
        "create -f qcow2 a 99E",
        "create -f qcow2 a 8E",
        "create -f qcow2 -o cluster_size=512 a 1P",
        "create -f qcow2 -F qcow2 a 1M",
        "create -f qcow2 -b base.qcow2 a 1M",
        "create -f raw -b base.qcow2 a 1M",
        "create -f qcow2 -b a -F qcow2 a 1M",
        "create -f qcow2 /nodir/a 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=8k a 1M",
        "create -f qcow2 -o extended_l2=on,compat=0.10 a 1M",
        "create -f qcow2 -o compression_type=foo a 1M",
        "create -f qcow2 -o compression_type=zstd,compat=0.10 a 1M",
        "create -f qcow2 -o data_file_raw=on a 1M",
        "create -f qcow2 -o encrypt.format=luks a 1M",
        "create -f qcow2 -o encrypt.format=foo a 1M",
        "create -f qcow2 -o encrypt.key-secret=s a 1M",
        "create -f qcow2 -b base.qcow2 -F raw -o backing_fmt=qcow2 a 1M",
        "create -f qcow2 -b base.qcow2 -F foo a",
        "create -f qcow2 -o preallocation=metadata -b base.qcow2 -F qcow2 a 1M",
        "create -f qcow2 -o data_file=d.raw,data_file_raw=on -b base.qcow2 -F qcow2 a 1M",
        "create -f qcow2 -o size=1M,encryption=on a",
        "create -f qcow2 -o size=10M a 20M",
        "create -f qcow2 a 1000",
        "create -f raw a 1000",
        "create a 10k",
        "create -f qcow2 -o nocow a 1k",
        "create -f qcow2 -o help",
        "create -f qcow2 -o cluster_size=4k,? a",
        "create -f raw -o help",
        "create -f qcow2 -o , a 1M",
        "create -f qcow2 -o cluster_size=4k, a 1M",
        "create -f qcow2 a -- -1024",
        "create -f qcow2 a -- foobar",
        "create -f qcow2 -o size=-1024 a",
        "create -f qcow2 -b base.qcow2 -F qcow2 a",
        "create -f qcow2 -b no -F qcow2 a",
        "create -f qcow2 -b no -F qcow2 -u a 1M",
        "create -f qcow2 -b no -F qcow2 -u a",
        "create -q -f qcow2 a 1M",
        "create --object secret,id=s,data=abc -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a 1M",
    ]);
}

#[test]
fn info_has_the_same_facts_in_the_same_order() {
    let mut lines = Vec::new();
    for name in [
        "base.qcow2",
        "d.qcow2",
        "ext.qcow2",
        "l.qcow2",
        "s.qcow2",
        "r.raw",
        "nofile",
    ] {
        for options in ["info", "info --output=json", "info --backing-chain"] {
            lines.push(format!("{options} {name}"));
        }
    }
    lines.push("info --output=xx base.qcow2".to_owned());
    lines.push("info --image-opts driver=qcow2,file.filename=base.qcow2".to_owned());
    lines.push("info --image-opts driver=qcow2,file.filename=base.qcow2,foo=bar".to_owned());
    lines.push("info foo:bar".to_owned());
    lines.push(
        "info json:{'driver':'qcow2','file':{'driver':'file','filename':'base.qcow2'}}".to_owned(),
    );
    let lines: Vec<_> = lines.iter().map(String::as_str).collect();
    compare_lines(&lines);
}

#[test]
fn checks_agree_in_words_and_exit_codes() {
    let mut lines = Vec::new();
    for name in [
        "base.qcow2",
        "c.qcow2",
        "ext.qcow2",
        "leak.qcow2",
        "lost.qcow2",
        "dirty.qcow2",
        "flag.qcow2",
        "nofile",
    ] {
        for options in [
            "check",
            "check --output=json",
            "check -r leaks",
            "check -r all",
            "check -q",
        ] {
            lines.push(format!("{options} {name}"));
        }
    }
    lines.push("check r.raw".to_owned());
    let lines: Vec<_> = lines.iter().map(String::as_str).collect();
    compare_lines(&lines);
}

#[test]
fn images_are_changed_and_looked_at_in_the_same_words() {
    compare_lines(&[
        "amend -o compat=0.10 c.qcow2",
        "amend -p -o compat=0.10 c.qcow2",
        "amend -p -o lazy_refcounts=on c.qcow2",
        "amend -o compat=0.10 dirty.qcow2",
        "amend -o backing_file=c.qcow2,backing_fmt=qcow2 d.qcow2",
        "amend -o backing_file=c.qcow2 d.qcow2",
        "amend -o backing_file=x,backing_fmt=qcow2 d.qcow2",
        "resize dirty.qcow2 2M",
        "snapshot -c one dirty.qcow2",
        "amend -o help -f qcow2",
        "amend -o foo=x c.qcow2",
        "amend -o cluster_size=4k c.qcow2",
        "amend -o refcount_bits=3 c.qcow2",
        "amend -o refcount_bits=8,compat=0.10 base.qcow2",
        "amend -o refcount_bits=8 base.qcow2",
        "amend -o size=1000 r.raw",
        "bitmap --add c.qcow2",
        "bitmap c.qcow2 b",
        "bitmap --remove c.qcow2 b",
        "bitmap --add -g 3 c.qcow2 b",
        "bitmap --merge x c.qcow2 b",
        "bitmap -g 1 --remove c.qcow2 b",
        "bitmap --add --disable c.qcow2 b",
        "commit c.qcow2",
        "commit nofile",
        "commit -b foo d.qcow2",
        "commit d.qcow2",
        "commit -d d.qcow2",
        "compare c.qcow2 d.qcow2",
        "compare c.qcow2 c.qcow2",
        "compare -s c.qcow2 base.qcow2",
        "compare c.qcow2 nofile",
        "convert c.qcow2",
        "convert -O foo c.qcow2 x",
        "convert -O qcow2 nofile x",
        "convert --target-is-zero c.qcow2 x",
        "convert -B foo -O raw c.qcow2 x",
        "convert -S 3 c.qcow2 x",
        "convert -c -O raw c.qcow2 x",
        "convert -l foo c.qcow2 x",
        "convert -n -O qcow2 c.qcow2 x",
        "convert --skip-broken-bitmaps c.qcow2 x",
        "convert --bitmaps -O qcow2 r.raw x",
        "convert -m 0 c.qcow2 x",
        "convert -n -o foo=x c.qcow2 x",
        "convert -O qcow2 d.qcow2 x",
        "convert -c -O qcow2 d.qcow2 x",
        "convert -O qcow2 c.qcow2 base.qcow2 x",
        "dd if=c.qcow2 of=x.raw bs=1k count=1",
        "dd if=c.qcow2",
        "dd if=c.qcow2 of=x bs=0",
        "dd if=c.qcow2 of=x foo=1",
        "create -f qcow2 a 1.0005k",
        "create -f qcow2 a 1.0009k",
        "create -f qcow2 a 0x400",
        "create -f qcow2 a 0x1k",
        "create -f qcow2 a +1k",
        "create -f qcow2 -o cluster_size=0x200 a 1M",
        "create -f qcow2 -o size=1.9999999k a",
        "map d.qcow2",
        "map --output=json d.qcow2",
        "map --start-offset=32k --max-length=200k --output=json d.qcow2",
        "measure -O qcow2 d.qcow2",
        "measure --output=json -O qcow2 d.qcow2",
        "measure --size 1G -O qcow2",
        "measure --size 1G d.qcow2",
        "measure",
        "measure -O raw d.qcow2",
        "rebase -b base.qcow2 d.qcow2",
        "rebase -b nofile -F qcow2 d.qcow2",
        "rebase -u -b nofile d.qcow2",
        "rebase -b base.qcow2 -F foo d.qcow2",
        "rebase -b base.qcow2 -F qcow2 d.qcow2",
        "rebase -b '' d.qcow2",
        "resize base.qcow2 2M",
        "resize base.qcow2 +1M",
        "resize base.qcow2 512k",
        "resize --shrink base.qcow2 -512k",
        "resize -f raw r.raw 3M",
        "resize r.raw 3M",
        "resize base.qcow2 --preallocation=foo 3M",
        "resize --shrink base.qcow2 0",
        "resize base.qcow2 foo",
        "amend -o compat=0.42 c.qcow2",
        "amend -o data_file=x c.qcow2",
        "measure --size 7E -O qcow2",
        "--foo",
        "snapshot -l s.qcow2",
        "snapshot -c two s.qcow2",
        "snapshot -a foo base.qcow2",
        "snapshot -a foo -f raw r.raw",
        "snapshot -d foo s.qcow2",
        "snapshot -d one s.qcow2",
        "snapshot -l -a foo s.qcow2",
        "foo",
    ]);
}

#[test]
fn bitmaps_without_a_place_are_told_of_in_the_same_words() {
    let full = |kib: u64| {
        format!(
            r#"json:{{"driver":"qcow2","node-name":"fmt","file":{{"driver":"raw","size":{},"file":{{"driver":"file","filename":"full.qcow2"}}}}}}"#,
            kib << 10
        )
    };
    let lines: Vec<String> = [384, 448]
        .iter()
        .flat_map(|kib| {
            let image = full(*kib);
            [
                format!("bitmap --add {image} b2"),
                format!("bitmap --add --disable {image} b2"),
                format!("bitmap --disable {image} b1"),
                format!("bitmap --clear {image} b1"),
                format!("resize {image} 20M"),
                format!("rebase -u -b '' {image}"),
                format!("amend -o lazy_refcounts=on {image}"),
                format!("snapshot -l {image}"),
                format!("bitmap --remove {image} b1"),
            ]
        })
        .collect();
    compare_lines(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn benchmarks_are_asked_for_in_the_same_words() {
    compare_lines(&[
        "bench -c 100 c.qcow2",
        "bench -c 100 -w base.qcow2",
        "bench -c 100 -w --flush-interval=70 --pattern 65 base.qcow2",
        "bench -c 100 -w --flush-interval=10 --no-drain -d 8 -s 8k -S 16k -o 512k base.qcow2",
        "bench -c 100 -d 4 -w --flush-interval=2 base.qcow2",
        "bench -c 0 base.qcow2",
        "bench -c x base.qcow2",
        "bench -c 99999999999 base.qcow2",
        "bench -d 0 base.qcow2",
        "bench -o -1 base.qcow2",
        "bench -s 0 base.qcow2",
        "bench -s 3G base.qcow2",
        "bench -S x base.qcow2",
        "bench -S 0 -c 3 base.qcow2",
        "bench --pattern 300 -w base.qcow2",
        "bench --flush-interval 3 base.qcow2",
        "bench -q -c 10 base.qcow2",
        "bench -U -c 10 base.qcow2",
        "bench -w -U -c 5 base.qcow2",
        "bench -c 10 -o 17M base.qcow2",
        "bench -c 10 -s 5M base.qcow2",
        "bench -i foo base.qcow2",
        "bench -i io_uring -c 5 base.qcow2",
        "bench -n -c 5 base.qcow2",
        "bench -t foo base.qcow2",
        "bench -t unsafe -w -c 5 base.qcow2",
        "bench -f raw -c 5 base.qcow2",
        "bench -f foo -c 5 base.qcow2",
        "bench --image-opts -c 2 driver=qcow2,file.filename=base.qcow2",
        "bench -c 3 nofile",
        "bench",
        "bench a b",
    ]);
}

#[test]
fn numbers_and_modes_that_make_no_sense_are_refused_in_the_same_words() {
    compare_lines(&[
        "bitmap --add -g x c.qcow2 b",
        "bitmap --add -g -1 c.qcow2 b",
        "bitmap --add -U c.qcow2 b",
        "bitmap --add s.qcow2 b",
        "bitmap --add --merge b -b s.qcow2 ext.qcow2 b",
        "bitmap --add c.qcow2 ''",
        "commit -r x d.qcow2",
        "commit -r -1 d.qcow2",
        "commit -t foo d.qcow2",
        "commit r.raw",
        "compare -T foo c.qcow2 d.qcow2",
        "convert -t foo c.qcow2 x",
        "convert -T foo c.qcow2 x",
        "convert -m x c.qcow2 x",
        "convert -r x c.qcow2 x",
        "convert -r -1 c.qcow2 x",
        "convert -S x c.qcow2 x",
        "convert -S 32M c.qcow2 x",
        "convert -l one r.raw x",
        "convert -l one s.qcow2 s.qcow2 x",
        "convert -l snapshot.foo=1 s.qcow2 x",
        "convert -F qcow2 c.qcow2 x",
        "convert --bitmaps -O raw s.qcow2 x",
        "convert -n -O qcow2 --target-image-opts c.qcow2 driver=qcow2,file.filename=base.qcow2",
        "dd if=c.qcow2 of=x bs=x",
        "dd if=c.qcow2 of=x bs=-1",
        "dd if=c.qcow2 of=x count=x",
        "dd if=c.qcow2 of=x skip=-5",
        "dd if=c.qcow2 of=x bs=1k count=2 skip=4",
        "dd -O foo if=c.qcow2 of=x",
        "dd if=c.qcow2 of=/nodir/x",
        "map -s -1 c.qcow2",
        "map -l x c.qcow2",
        "map --output=json -s 8M c.qcow2",
        "map --output=json -l 0 c.qcow2",
        "rebase -t foo -b base.qcow2 -F qcow2 d.qcow2",
        "rebase -T foo -b base.qcow2 -F qcow2 d.qcow2",
        "rebase -p -u -b base.qcow2 -F qcow2 d.qcow2",
    ]);
}

#[test]
fn what_is_made_shows_the_same_disk() {
    compare_made(&[
        "convert -O qcow2 -S 1536 c.qcow2 x",
        "convert -O qcow2 -o size=10M c.qcow2 x",
        "convert -O qcow2 -o size=512k c.qcow2 x",
        "convert -O qcow2 -o preallocation=full c.qcow2 x",
        "convert -O qcow2 -o preallocation=falloc c.qcow2 x",
        "convert -O qcow2 -t none -T none d.qcow2 x",
        "convert -c -O qcow2 d.qcow2 x",
        "convert -O qcow2 -B c.qcow2 -F qcow2 d.qcow2 x",
        "convert -O qcow2 c.qcow2 r.raw x",
        "convert -O qcow2 -l one s.qcow2 x",
        "dd -O qcow2 if=c.qcow2 of=x bs=32k count=6 skip=1",
        "dd -O qcow2 if=c.qcow2 of=x bs=1000 count=500",
        "dd -O qcow2 if=c.qcow2 of=x bs=100k skip=3",
    ]);
}

#[test]
fn names_need_not_be_utf_8() {
    if is_available(11, "names that are not UTF-8") {
        compare_odd_names();
    }
}
