//! What `qemu-io` says, and what we say.

use super::beside::{compare, is_available, scene};

/// Commands, each tried on an image of its own.
const COMMANDS: &[&str] = &[
    "read 0 512",
    "write 0 64k",
    "write -P 0xab 1k 1000",
    "read -P 0xab 0 512",
    "read -v 0 40",
    "read -P 1 -s 1k -l 512 0 2k",
    "read 1M 512",
    "write 1M 512",
    "write 1023k 2k",
    "read foo 1",
    "read 0 foo",
    "read 0",
    "read",
    "read -Z 0 1",
    "read -P foo 0 512",
    "read -P 0xabc 0 512",
    "read -l 1k 0 512",
    "read -s 3 0 512",
    "write -z 0 64k",
    "write -zu 0 64k",
    "write -z -P 1 0 64k",
    "write -u 0 64k",
    "write -c 512k 64k",
    "write -c 0 63k",
    "write -n 0 512",
    "write -f 0 512",
    "write -b 0 512",
    "read -b 0 512",
    "read -b 1 512",
    "read -p 0 512",
    "read -q 0 512",
    "readv 0 512 512",
    "readv 0",
    "readv -P 1 0 512",
    "writev 0 512 1k",
    "writev -P 3 0 512 1k",
    "aio_write 0 512",
    "aio_read 0 512",
    "aio_read -P 1 0 512",
    "aio_read 2M 512",
    "aio_write 2M 512",
    "aio_flush",
    "flush",
    "discard 0 64k",
    "discard 0",
    "discard foo 1",
    "discard 2M 1",
    "truncate 2M",
    "truncate foo",
    "length",
    "info",
    "map",
    "alloc 0",
    "alloc 0 1M",
    "alloc 3M",
    "alloc foo",
    "sleep 1",
    "foo",
    "help foo",
    "quit",
    "close",
    "open base.qcow2",
    "reopen",
    "reopen -r",
    "write 0 3G",
    "read 0 0",
    "write 0 0",
    "write -s /nofile 0 512",
    "break foo bar",
    "resume foo",
    "remove_break foo",
    "read -1 512",
    "read 0 0x200",
    "read 0 0x1k",
    "read 0 1.0009k",
    "read 0 +1k",
    "zone_report 0 1",
    "zrp 0 1",
    "zone_report 0",
    "zone_report 0 1 2",
    "zone_report x 1",
    "zone_open 0 1M",
    "zo 0 x",
    "zone_close 0 1M",
    "zc 0",
    "zone_finish 0 1M",
    "zf",
    "zone_reset 0 1M",
    "zrs 0 99999999999999999999",
    "zone_append -p 0 4k",
    "zap 0 4k 4k",
    "zone_append 0 4k",
    "zone_append 0 4k 4x",
    "help zone_append",
    "help zrs",
    "help l",
    "r 0",
    "c 1",
    "o",
    "open -t foo c.qcow2",
    "open -d foo c.qcow2",
    "reopen -o driver=raw",
    "reopen -o driver=qcow2",
    "reopen -o driver=foo",
    "reopen -o foo=bar",
    "reopen -o filename=x",
    "reopen -o file.driver=file",
    "reopen -o file.driver=null-co",
    "reopen -o file.filename=c.qcow2",
    "reopen -o file.filename=base.qcow2",
    "reopen -o file.locking=off",
    "reopen -o file.aio=native",
    "reopen -o backing.driver=raw",
    "reopen -o data-file=x",
    "reopen -o node-name=x",
    "reopen -o size=1",
    "reopen -o cache.foo=1",
    "reopen -o cache.direct=on",
    "reopen -o overlap-check.foo=on",
    "reopen -o overlap-check.main-header=off",
    "reopen -o force-share=on",
    "reopen -o lazy-refcounts=on",
    "reopen -o discard=unmap,detect-zeroes=on",
    "open -k r.raw",
];

#[test]
fn single_commands_are_answered_alike() {
    if !is_available(COMMANDS.len(), "commands of qemu-io") {
        return;
    }
    let lines: Vec<[&str; 3]> = COMMANDS
        .iter()
        .map(|command| ["-c", *command, "c.qcow2"])
        .collect();
    let words: Vec<&[&str]> = lines.iter().map(<[&str; 3]>::as_slice).collect();
    compare("qemu-io", scene().path(), &words);
}

#[test]
fn disks_are_opened_and_worked_on_alike() {
    let lines: &[&[&str]] = &[
        &["-c", "read 0 512", "nofile"],
        &["-f", "qcow2", "-c", "read 0 512", "r.raw"],
        &[
            "-f",
            "raw",
            "-c",
            "write -P 7 0 1k",
            "-c",
            "read -P 7 0 1k",
            "r.raw",
        ],
        &["-r", "-c", "write 0 512", "c.qcow2"],
        &[
            "-c",
            "write -P 1 0 64k",
            "-c",
            "discard 0 64k",
            "-c",
            "read -P 0 0 64k",
            "base.qcow2",
        ],
        &["-C", "-c", "read 0 64k", "-c", "map", "d.qcow2"],
        &[
            "-s",
            "-c",
            "write -P 9 0 64k",
            "-c",
            "read -P 9 0 64k",
            "c.qcow2",
        ],
        &["-c", "read -P 0 0 64k", "l.qcow2"],
        &[
            "--object",
            "secret,id=s,data=abc",
            "--image-opts",
            "-c",
            "read -P 0 0 64k",
            "driver=qcow2,file.filename=l.qcow2,encrypt.key-secret=s",
        ],
        &[
            "--object",
            "secret,id=s,data=wrong",
            "--image-opts",
            "-c",
            "read 0 64k",
            "driver=qcow2,file.filename=l.qcow2,encrypt.key-secret=s",
        ],
        &["-c", "open -o driver=null-co,size=1M", "-c", "length"],
        &[
            "-c",
            "open -o driver=raw,offset=512,size=1k,file.filename=r.raw",
            "-c",
            "length",
        ],
        &["-c", "open blkdebug::c.qcow2", "-c", "read 0 64k"],
        &[
            "-c",
            "open -o driver=blkdebug,image.driver=qcow2,image.file.filename=c.qcow2,inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=28",
            "-c",
            "read 0 64k",
        ],
        &["-c", "reopen -o l2-cache-size=foo", "c.qcow2"],
        &["-c", "reopen -o backing.driver=qcow2", "d.qcow2"],
        &["-c", "reopen -o backing.driver=raw", "d.qcow2"],
        &["-c", "reopen -o backing.l2-cache-size=64k", "d.qcow2"],
        &[
            "-f",
            "raw",
            "-c",
            "reopen -o offset=512,size=512",
            "-c",
            "length",
            "r.raw",
        ],
        &["-f", "raw", "-c", "reopen -o driver=qcow2", "r.raw"],
        &["-k", "-c", "length", "c.qcow2"],
        &["-i", "native", "-c", "length", "c.qcow2"],
        &["-i", "threads", "-c", "length", "c.qcow2"],
        &["-i", "foo", "-c", "length", "c.qcow2"],
        &["-c", "open -i native c.qcow2", "-c", "open -i foo c.qcow2"],
        &[
            "--image-opts",
            "-c",
            "length",
            "driver=file,filename=r.raw,aio=native",
        ],
        &[
            "--image-opts",
            "-c",
            "length",
            "driver=file,filename=r.raw,aio=foo",
        ],
        &["-c", "reopen -r -w", "c.qcow2"],
        &["-c", "reopen -c foo", "c.qcow2"],
        &["-c", "aio_write -i 1 512", "-c", "read -v 0 16", "c.qcow2"],
        &["-c", "sleep x", "c.qcow2"],
        &["-U", "-c", "length", "c.qcow2"],
        &["-Z"],
    ];
    if !is_available(lines.len(), "command lines of qemu-io") {
        return;
    }
    // The last one differs in the help that follows.
    let (last, rest) = lines.split_last().unwrap();
    compare("qemu-io", scene().path(), rest);
    assert_eq!(last.len(), 1);
}

#[test]
fn reopening_starts_from_what_open_said() {
    let again = |first: &'static str, second: &'static str| {
        ["-c", first, "-c", second, "-c", "write 0 512", "d.qcow2"]
    };
    let opened = |first: &'static str, second: &'static str| {
        ["-c", first, "-c", second, "-c", "write 0 512", "-c", "info"]
    };
    let on_open_disks = [
        again("reopen -r", "reopen"),
        again("reopen -r", "reopen -o read-only=off"),
        again("reopen -o cache-size=1M", "reopen -o l2-cache-size=512k"),
        again(
            "reopen -o overlap-check=none",
            "reopen -o overlap-check.template=all",
        ),
        again("reopen -r -o read-only=on", "reopen -w -o read-only=foo"),
        again(
            "reopen -c none -o cache.direct=on",
            "reopen -c writeback -o cache.no-flush=on",
        ),
        again(
            "reopen -c foo -o cache.direct=on",
            "reopen -c none -o cache.writeback=on",
        ),
        again(
            "reopen -r -c none -o read-only=on,cache.direct=on",
            "reopen -o file.node-name=a",
        ),
    ];
    let to_be_opened = [
        opened("open -r c.qcow2", "reopen -o read-only=off"),
        opened("open -r -o read-only=off c.qcow2", "reopen"),
        opened("open -r -o read-only=on c.qcow2", "reopen"),
        opened("open -r -o read-only=on c.qcow2", "reopen -w"),
        opened("open -o read-only=on c.qcow2", "reopen"),
        opened("open -o file.read-only=on c.qcow2", "reopen"),
        opened("open -o node-name=a c.qcow2", "reopen -o node-name=a"),
        opened(
            "open -o file.node-name=a c.qcow2",
            "reopen -o file.node-name=a",
        ),
        opened(
            "open -o backing.node-name=a d.qcow2",
            "reopen -o backing.node-name=a",
        ),
        opened(
            "open -o l2-cache-size=1M c.qcow2",
            "reopen -o cache-size=2M",
        ),
        opened("open -o driver=null-co,size=64k", "reopen"),
        opened("open -o driver=raw,file.driver=null-co", "reopen"),
        opened("open -o driver=file,filename=r.raw", "reopen"),
        opened("open -o driver=blkdebug,image.driver=null-co", "reopen"),
    ];
    if !is_available(
        on_open_disks.len() + to_be_opened.len(),
        "command lines of qemu-io",
    ) {
        return;
    }
    let mut lines: Vec<&[&str]> = on_open_disks.iter().map(|line| &line[..]).collect();
    lines.extend(to_be_opened.iter().map(|line| &line[..]));
    compare("qemu-io", scene().path(), &lines);
}

#[test]
fn what_refcounts_wrongly_call_free_is_told_alike() {
    // A refcount of 0 for the clusters from the one at this place of the refcount block on, and a request that needs one.
    let cases = [
        ("131072 2", "open base.qcow2", "write 0 64k"),
        ("131072 8", "open base.qcow2", "write 0 64k"),
        ("131074 2", "open base.qcow2", "write 0 64k"),
        ("131076 2", "open base.qcow2", "write 0 64k"),
        ("131078 2", "open base.qcow2", "write 0 64k"),
        ("65536 8", "open base.qcow2", "write 0 64k"),
    ];
    if !is_available(cases.len(), "damaged images") {
        return;
    }
    let damage = cases.map(|(place, ..)| format!("write -q -P 0 {place}"));
    let lines: Vec<_> = cases
        .iter()
        .zip(&damage)
        .map(|((_, open, request), damage)| {
            let raw = "open -o driver=raw,file.filename=base.qcow2";
            [
                "-c", raw, "-c", damage, "-c", "close", "-c", *open, "-c", *request,
            ]
        })
        .collect();
    let lines: Vec<&[&str]> = lines.iter().map(|line| &line[..]).collect();
    compare("qemu-io", scene().path(), &lines);
}

#[test]
fn refcount_blocks_that_fail_are_told_alike() {
    let mut opens = Vec::new();
    for event in ["refblock_load", "refblock_update_part", "refblock_alloc"] {
        for once in ["on", "off"] {
            opens.push(format!(
                "open -o driver=qcow2,file.driver=blkdebug,file.image.filename=base.qcow2,\
                 file.inject-error.0.event={event},file.inject-error.0.errno=28,file.inject-error.0.once={once}"
            ));
        }
    }
    if !is_available(opens.len(), "faults of refcount blocks") {
        return;
    }
    let lines: Vec<_> = opens
        .iter()
        .map(|open| ["-t", "writethrough", "-c", open, "-c", "write 0 128k"])
        .collect();
    let lines: Vec<&[&str]> = lines.iter().map(|line| &line[..]).collect();
    compare("qemu-io", scene().path(), &lines);
}

#[test]
fn a_copy_under_way_fails_when_the_image_turns_out_to_be_corrupt() {
    // A second table behind the first data, which is then given up; the table is called free, too.
    let damage = [
        "open d.qcow2",
        "truncate 1G",
        "write -q 512M 64k",
        "close",
        "open -o driver=raw,file.filename=d.qcow2",
        "write -q -P 0 262208 8",
        "write -q -P 0 131082 2",
        "write -q -P 0 131084 2",
        "close",
        "open -o driver=qcow2,file.driver=blkdebug,file.image.filename=d.qcow2",
    ];
    let cases: [&[&str]; 3] = [
        &[
            "break cow_read 0",
            "aio_write 0 1k",
            "wait_break 0",
            "write 64k 64k",
            "resume 0",
            "aio_flush",
            "write 0 1k",
        ],
        &["write 0 1k", "write 64k 64k", "write 128k 64k"],
        &[
            "break cow_write 0",
            "aio_write 0 1k",
            "wait_break 0",
            "resume 0",
            "aio_flush",
        ],
    ];
    if !is_available(cases.len(), "copies into new clusters") {
        return;
    }
    let lines: Vec<Vec<&str>> = cases
        .iter()
        .map(|case| {
            let words = damage.iter().chain(case.iter());
            words.flat_map(|word| ["-c", *word]).collect()
        })
        .collect();
    let lines: Vec<&[&str]> = lines.iter().map(|line| &line[..]).collect();
    compare("qemu-io", scene().path(), &lines);
}

#[test]
fn parts_of_blocks_are_written_one_after_the_other() {
    let open = "open -o driver=raw,file.driver=blkdebug,file.align=4k,file.image.filename=r.raw";
    let cases: [&[&str]; 4] = [
        &[
            "break pwritev_rmw_after_tail A",
            "aio_write -q -P 10 0x5000 0x200",
            "wait_break A",
            "aio_write -q -P 11 0x5200 0x200",
            "sleep 100",
            "resume A",
            "aio_flush",
            "read -P 10 0x5000 0x200",
            "read -P 11 0x5200 0x200",
        ],
        &[
            "break pwritev_rmw_head A",
            "aio_write -q -P 12 0x1e00 0x400",
            "wait_break A",
            "aio_write -q -P 13 0x2000 0x1000",
            "sleep 100",
            "resume A",
            "aio_flush",
            "read -P 13 0x2000 0x1000",
        ],
        // Whole blocks are read by nobody.
        &[
            "break pwritev A",
            "break pwritev_done B",
            "aio_write -q -P 14 0x3000 0x1000",
            "wait_break A",
            "resume A",
            "wait_break B",
            "resume B",
            "aio_flush",
            "read -P 14 0x3000 0x1000",
        ],
        &["write -P 15 0x7001 1", "read -P 15 0x7001 1", "length"],
    ];
    if !is_available(cases.len(), "writes of parts of blocks") {
        return;
    }
    let lines: Vec<Vec<&str>> = cases
        .iter()
        .map(|case| {
            let words = [&open].into_iter().chain(case.iter());
            words.flat_map(|word| ["-c", *word]).collect()
        })
        .collect();
    let lines: Vec<&[&str]> = lines.iter().map(|line| &line[..]).collect();
    compare("qemu-io", scene().path(), &lines);
}
