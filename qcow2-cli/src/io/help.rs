//! What `help COMMAND` says beyond the line that all commands have.

/// What a command does, and what its options are for.
type Details = (&'static str, &'static [(char, &'static str)]);

const BRIEF: (char, &str) = ('C', "tell how long it took in one line for programs");
const QUIET: (char, &str) = ('q', "don't tell how long it took");
const BUFFER: (char, &str) = ('r', "register the buffer");
const DUMP: (char, &str) = ('v', "show the bytes");
const WANTED: (char, &str) = ('P', "compare what is read with this byte");
const FILLED: (char, &str) = ('P', "write this byte instead of 0xcd");
const FLUSHED: (char, &str) = ('f', "make it durable before it is told as done");
const UNMAPPED: (char, &str) = ('u', "with -z: space may be given back");
const INVALID: (char, &str) = ('i', "count the request as invalid instead of doing it");
const COMPATIBLE: (char, &str) = ('p', "taken, without effect");

/// More of a command, if there is more to say.
pub(super) fn details(command: &str) -> Option<Details> {
    Some(match command {
        "aio_read" => (
            "Begins to read; the next command does not wait for it, `aio_flush` does. Lengths follow each other.",
            &[BRIEF, INVALID, WANTED, QUIET, BUFFER, DUMP],
        ),
        "aio_write" => (
            "Begins to write; the next command does not wait for it, `aio_flush` does. Lengths follow each other.",
            &[
                BRIEF,
                FLUSHED,
                INVALID,
                FILLED,
                QUIET,
                BUFFER,
                UNMAPPED,
                ('z', "write zeros"),
            ],
        ),
        "discard" => (
            "Gives space back: `discard 512 1k` that of 1 KiB behind the first sector. What is no whole cluster stays.",
            &[BRIEF, QUIET],
        ),
        "open" => (
            "Opens a disk for the commands that follow: `open -n -o driver=raw a.img`.",
            &[
                ('r', "for reading only"),
                ('s', "with a temporary overlay for what is written"),
                ('C', "keep what is read from backing files"),
                ('n', "past the page cache, as -t none"),
                ('U', "beside a program that writes"),
                ('k', "as -i native"),
                ('i', "how requests are made: threads, native or io_uring"),
                ('t', "how the page cache is used"),
                ('d', "whether discards have an effect"),
                ('o', "options of the driver"),
            ],
        ),
        "read" => (
            "Reads a range: `read -v 512 1k` shows 1 KiB from the second sector on.",
            &[
                ('b', "of the machine's state, not of the disk"),
                BRIEF,
                ('l', "with -P: compare only so many bytes"),
                COMPATIBLE,
                WANTED,
                QUIET,
                BUFFER,
                ('s', "with -P: compare from here on"),
                DUMP,
            ],
        ),
        "readv" => (
            "Reads ranges that follow each other, each into a buffer of its own: `readv 512 1k 1k`.",
            &[BRIEF, WANTED, QUIET, BUFFER, DUMP],
        ),
        "reopen" => (
            "Opens the disk anew, as it was opened first but for what is said here: `reopen -o lazy-refcounts=on`.",
            &[
                ('r', "for reading only"),
                ('w', "for reading and writing"),
                ('c', "how the page cache is used"),
                ('o', "options of the driver"),
            ],
        ),
        "sigraise" => (
            "Sends this program the signal of that number: `sigraise 15` asks it to end.",
            &[],
        ),
        "write" => (
            "Writes a range, in bytes of 0xcd: `write 512 1k` 1 KiB from the second sector on.",
            &[
                ('b', "of the machine's state, not of the disk"),
                ('c', "compressed"),
                BRIEF,
                FLUSHED,
                ('n', "with -z: only if that takes no writing of data"),
                COMPATIBLE,
                FILLED,
                QUIET,
                BUFFER,
                ('s', "write what this file has, over and over"),
                UNMAPPED,
                ('z', "write zeros"),
            ],
        ),
        "writev" => (
            "Writes ranges that follow each other, each from a buffer of its own: `writev 512 1k 1k`.",
            &[BRIEF, FLUSHED, FILLED, QUIET, BUFFER],
        ),
        _ => return None,
    })
}
