//! `bench`: how fast requests of one kind are answered.

mod run;

use std::process::ExitCode;

use qcow2_io::Storage;

use self::run::Load;
use super::args::{self, ANY_BYTES, CacheMode, Common, Failure};
use crate::node::Access;
use crate::words::getopt::{Long, Spec};
use crate::words::system;
use crate::{Console, say};

/// Options without a letter.
const OBJECT: char = '\u{1}';
const IMAGE_OPTS: char = '\u{2}';
const PATTERN: char = '\u{3}';
const FLUSH_INTERVAL: char = '\u{4}';
const NO_DRAIN: char = '\u{5}';

const SPEC: Spec = Spec {
    short: "hf:t:c:d:o:s:S:i:nwqU",
    long: &[
        Long::flag("help", 'h'),
        Long::value("format", 'f'),
        Long::flag("image-opts", IMAGE_OPTS),
        Long::value("cache", 't'),
        Long::value("count", 'c'),
        Long::value("depth", 'd'),
        Long::value("offset", 'o'),
        Long::value("buffer-size", 's'),
        Long::value("step-size", 'S'),
        Long::flag("write", 'w'),
        Long::value("pattern", PATTERN),
        Long::value("flush-interval", FLUSH_INTERVAL),
        Long::flag("no-drain", NO_DRAIN),
        Long::value("aio", 'i'),
        Long::flag("native", 'n'),
        Long::flag("force-share", 'U'),
        Long::flag("quiet", 'q'),
        Long::value("object", OBJECT),
    ],
};

const USAGE: &str = "qemu-img bench [-f FMT | --image-opts] [-t CACHE_MODE] [-c COUNT] [-d DEPTH] [-o OFFSET] [-s BUFFER_SIZE]
        [-S STEP_SIZE] [-i AIO] [-n] [-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]] [-U] [-q]
        [--object OBJDEF] FILE

Send requests of one kind to a disk, and tell how long they took. Writing changes the disk.
  -f, --format FMT               format of FILE (default: what it looks like)
  --image-opts                   FILE is a list of options
  -t, --cache CACHE_MODE         none, directsync, writeback (the default), writethrough or unsafe
  -c, --count COUNT              so many requests (default: 75000)
  -d, --depth DEPTH              so many at once (default: 64)
  -o, --offset OFFSET            where the first one begins (default: 0)
  -s, --buffer-size BYTES        bytes of a request (default: 4096)
  -S, --step-size BYTES          from one to the next (default: the bytes of a request); behind the end of the disk from the start
  -w, --write                    write instead of reading
  --pattern PATTERN              what is written: bytes of this value (default: 0)
  --flush-interval INTERVAL      flush after each so many requests
  --no-drain                     and don't wait for requests under way
  -i, --aio AIO, -n, --native    taken without effect
  -U, --force-share              read beside a program that writes
  --object OBJDEF                define an object, such as a secret
  -q, --quiet                    taken without effect";

/// The largest number of requests, and other counts.
const COUNT_MAX: u64 = i32::MAX.unsigned_abs() as u64;

/// What a command line asks for.
struct Plan {
    common: Common,
    format: Option<String>,
    cache: CacheMode,
    force_share: bool,
    is_native: bool,
    flush_interval_given: bool,
    load: Load,
    step: Option<u64>,
}

/// Runs the command.
pub(super) fn run(words: &[String], console: &Console) -> Result<ExitCode, Failure> {
    let parsed = args::parse("bench", &SPEC, words)?;
    let mut plan = Plan {
        common: Common::default(),
        format: None,
        cache: CacheMode::default(),
        force_share: false,
        is_native: false,
        flush_interval_given: false,
        load: Load::default(),
        step: None,
    };
    for (code, value) in parsed.options {
        if code == 'h' {
            say!(console, "{USAGE}");
            return Ok(ExitCode::SUCCESS);
        }
        plan.take(code, value)?;
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::usage("bench", "Expecting one image file name"));
    };
    plan.measure(name, console)
}

impl Plan {
    fn take(&mut self, code: char, value: String) -> Result<(), Failure> {
        let count = |what: &str, least: u64| args::number(what, &value, least..=COUNT_MAX);
        match code {
            'f' => self.format = Some(value),
            't' => {
                self.cache = CacheMode::from_name(&value)
                    .ok_or_else(|| Failure::new("Invalid cache mode"))?;
            }
            'c' => self.load.count = count("request count", 1)?,
            'd' => self.load.depth = count("queue depth", 1)?,
            'o' => self.load.offset = args::number("offset", &value, ANY_BYTES)?,
            's' => self.load.bytes = count("buffer size", 1)?,
            'S' => self.step = Some(count("step size", 0)?),
            'w' => self.load.writes = true,
            'U' => self.force_share = true,
            'n' => self.is_native = true,
            'i' => match value.as_str() {
                "threads" | "io_uring" => self.is_native = false,
                "native" => self.is_native = true,
                other => {
                    return Err(Failure::new(format_args!("Invalid aio option: {other}")));
                }
            },
            OBJECT => self.common.objects.add(&value).map_err(Failure::new)?,
            IMAGE_OPTS => self.common.image_opts = true,
            PATTERN => {
                let byte = args::number("pattern byte", &value, 0..=u8::MAX.into())?;
                self.load.pattern = u8::try_from(byte).unwrap_or(0);
            }
            FLUSH_INTERVAL => {
                self.load.flush_interval = count("flush interval", 0)?;
                self.flush_interval_given = true;
            }
            NO_DRAIN => self.load.drains = false,
            _ => {}
        }
        Ok(())
    }

    fn measure(mut self, name: &str, console: &Console) -> Result<ExitCode, Failure> {
        let load = &mut self.load;
        if !load.writes && load.flush_interval > 0 {
            return Err(Failure::new(
                "--flush-interval is only available in write tests",
            ));
        }
        if self.flush_interval_given && load.flush_interval > 0 && load.flush_interval < load.depth
        {
            return Err(Failure::new("Flush interval can't be smaller than depth"));
        }
        if self.is_native && !self.cache.direct {
            return Err(Failure::new(format_args!(
                "Could not open '{name}': aio=native was specified, but it requires cache.direct=on, which was not specified."
            )));
        }
        if self.force_share && load.writes {
            return Err(Failure::new(format_args!(
                "Could not open '{name}': force-share=on can only be used with read-only images"
            )));
        }
        let access = Access {
            write: load.writes,
            force_share: self.force_share,
            direct: self.cache.direct,
            ..Access::read()
        };
        load.flushes_each = load.writes && self.cache.write_through;
        let node = self.common.open(name, self.format.as_deref(), &access)?;
        let storage = node.storage();
        load.disk = storage
            .len()
            .map_err(|error| Failure::new(system::describe(&error)))?;
        load.step = match self.step {
            None | Some(0) => load.bytes,
            Some(step) => step,
        };
        announce(load, console);
        let took = load
            .run(&*storage)
            .map_err(|error| Failure::new(format_args!("Failed request: {error}")))?;
        say!(
            console,
            "Run completed in {:.3} seconds.",
            took.as_secs_f64()
        );
        drop(storage);
        args::close(node)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn announce(load: &Load, console: &Console) {
    let kind = if load.writes { "write" } else { "read" };
    say!(
        console,
        "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        load.count,
        load.bytes,
        load.depth,
        load.offset,
        load.step
    );
    if load.flush_interval > 0 {
        say!(
            console,
            "Sending flush every {} requests",
            load.flush_interval
        );
    }
}
