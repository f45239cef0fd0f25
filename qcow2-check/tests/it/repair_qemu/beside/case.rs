//! A damaged image, repaired by both, and where the results differ.

use qcow2_check::repair::{Level, PlanError, RepairOptions, plan, undo};
use qcow2_check::{Code, Finding, Options, Report, Verdict, check};
use qcow2_io::{Event, Memory, Trace};

use super::super::guest::{self, Disk, Guest};
use super::super::mutants::{damaged, lost};
use crate::mutants::bases::{Base, IMAGE};
use crate::mutants::damage::Mutant;
use crate::oracle::{Access, Judgement, Workshop, secret_args, target, words};

/// Bytes of a file that QEMU has repaired that are read: it lets some grow to a tebibyte.
const READ_BYTES: u64 = 64 << 20;
/// Largest disk that is converted.
const DISK_BYTES: u64 = 64 << 20;

/// What became of a damaged image at one level.
pub(super) struct Ours {
    pub(super) level: Level,
    /// Nothing was there to begin with, and why.
    pub(super) hopeless: Option<Box<Finding>>,
    pub(super) plan: String,
    pub(super) kinds: Vec<&'static str>,
    pub(super) report: Option<Report>,
    /// What QEMU says of the result.
    pub(super) theirs: Option<Judgement>,
    pub(super) guest: Option<Guest>,
    pub(super) kept_orphans: bool,
    bytes: Vec<u8>,
}

impl Ours {
    pub(super) fn verdict(&self) -> Verdict {
        self.report
            .as_ref()
            .map_or(Verdict::Incomplete, Report::verdict)
    }

    pub(super) fn has(&self, code: Code) -> bool {
        self.report.as_ref().is_some_and(|r| r.total(code) > 0)
    }

    pub(super) fn did(&self, kind: &str) -> bool {
        self.kinds.contains(&kind)
    }

    /// Whether QEMU says this of the result.
    pub(super) fn says(&self, words: &str) -> bool {
        let theirs = self.theirs.as_ref();
        theirs.is_some_and(|theirs| theirs.message.contains(words))
    }

    /// Whether both checkers call it clean.
    pub(super) fn is_clean(&self) -> bool {
        let theirs = self.theirs.as_ref().and_then(|theirs| theirs.exit);
        self.verdict() == Verdict::Sound && theirs == Some(0)
    }
}

/// What QEMU's repair has made of it.
pub(super) struct Theirs {
    /// The run that repairs.
    pub(super) run: Judgement,
    /// The check after it.
    pub(super) check: Judgement,
    /// Whether the result can be opened.
    pub(super) opens: bool,
    pub(super) guest: Option<Guest>,
}

/// All about one damaged image.
pub(super) struct Case<'a> {
    pub(super) base: &'a Base,
    pub(super) mutant: &'a Mutant,
    pub(super) sound: &'a Guest,
    pub(super) damaged: Option<Guest>,
    pub(super) leaks: Ours,
    pub(super) all: Ours,
    pub(super) salvage: Ours,
    pub(super) theirs: Theirs,
    /// What no rule excuses.
    pub(super) failures: Vec<String>,
}

/// A place of a disk that reads one way after our repair, and another after QEMU's.
pub(super) struct Spot {
    /// `None` is the active disk.
    pub(super) snapshot: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) cluster: usize,
    /// Content before the damage, with it, after our repair and after QEMU's; `None` where it can't be read.
    pub(super) sound: Option<u64>,
    pub(super) damaged: Option<u64>,
    pub(super) ours: Option<u64>,
    pub(super) theirs: Option<u64>,
    /// Content of a place without data.
    pub(super) empty: Option<u64>,
    /// Whether the place is within our disk, and within theirs.
    pub(super) is_ours: bool,
    pub(super) is_theirs: bool,
}

impl<'a> Case<'a> {
    /// Repairs an image with this damage, in every way.
    pub(super) fn new(
        base: &'a Base,
        sound: &'a Guest,
        mutant: &'a Mutant,
        shop: &Workshop,
    ) -> Self {
        let bytes = damaged(base, mutant);
        let mut failures = Vec::new();
        let mut at = |level| at_level(base, shop, &bytes, level, &mut failures);
        let leaks = at(Level::Leaks);
        let all = at(Level::All);
        let salvage = at(Level::Salvage);
        let theirs = by_qemu(base, shop, &bytes);
        let mut case = Self {
            base,
            mutant,
            sound,
            damaged: guest::read(&bytes),
            leaks,
            all,
            salvage,
            theirs,
            failures,
        };
        case.judge_losses();
        case.judge_reader(shop);
        case
    }

    /// Whether `all` has nothing to begin with for a finding of this kind at one of these offsets of the header.
    pub(super) fn is_hopeless_for(&self, code: Code, offsets: &[u64]) -> bool {
        self.all.hopeless.as_ref().is_some_and(|finding| {
            let host = finding.place.host.as_ref();
            finding.code == code && host.is_some_and(|host| offsets.contains(&host.start))
        })
    }

    /// Whether all that is left is what has lost its references, in an image that can't have snapshots.
    pub(super) fn leaks_with_data_file(&self, ours: &Ours) -> bool {
        self.base.name.starts_with("data-file")
            && ours.kept_orphans
            && ours.verdict() == Verdict::Leaks
    }

    /// What is compared with QEMU's repair: that of `all`, or what a search finds where `all` has nothing to begin with.
    pub(super) fn ours(&self) -> &Ours {
        if self.all.hopeless.is_some() {
            &self.salvage
        } else {
            &self.all
        }
    }

    /// No level loses a cluster with all that leads to it.
    fn judge_losses(&mut self) {
        let Some(damaged) = &self.damaged else { return };
        for ours in [&self.leaks, &self.all, &self.salvage] {
            let Some(now) = &ours.guest else { continue };
            let lost = lost(self.sound, damaged, now);
            if let Some(first) = lost.first() {
                let (level, count) = (ours.level, lost.len());
                self.failures.push(format!(
                    "{level} loses {count} undamaged, {first}\n{}",
                    ours.plan
                ));
            }
        }
    }

    /// The test's own reader reads what QEMU reads.
    fn judge_reader(&mut self, shop: &Workshop) {
        let is_plain =
            self.base.access == Access::Plain && !self.base.name.starts_with("data-file");
        let size = self.all.bytes.get(24..32);
        let size = size.map_or(u64::MAX, |size| {
            u64::from_be_bytes(size.try_into().unwrap())
        });
        let Some(now) = &self.all.guest else { return };
        if !is_plain || !self.all.is_clean() || size > DISK_BYTES {
            return;
        }
        // The test's reader doesn't look at the backing file's name.
        let backing = 8..20;
        if self.all.bytes.get(backing.clone()) != self.base.bytes.get(backing) {
            return;
        }
        if now.active.iter().any(|cluster| cluster.content.is_none()) {
            // What compressed data is worth, no check of this kind looks at.
            return;
        }
        shop.write(IMAGE, &self.all.bytes);
        let said = shop.ask(
            "qemu-img",
            &words("convert -f qcow2 -O raw image.qcow2 disk"),
        );
        if said.exit != Some(0) {
            self.failures
                .push(format!("clean, but not to be read: {}", said.message));
            return;
        }
        let disk = shop.read("disk");
        let cluster = disk
            .len()
            .div_ceil(now.active.len().max(1))
            .next_power_of_two();
        for (index, (bytes, now)) in disk.chunks(cluster).zip(&now.active).enumerate() {
            let mut bytes = bytes.to_vec();
            bytes.resize(cluster, 0);
            let is_short = disk.len() < (index + 1) * cluster;
            if !is_short && now.content != Some(guest::hash(&bytes)) {
                self.failures
                    .push(format!("QEMU reads something else at cluster {index}"));
                return;
            }
        }
    }

    /// Where the results differ.
    pub(super) fn spots(&self) -> Vec<Spot> {
        let none = Disk::new();
        let empty = Guest::default();
        let ours = self.ours().guest.as_ref().unwrap_or(&empty);
        let theirs = self.theirs.guest.as_ref().unwrap_or(&empty);
        let damaged = self.damaged.as_ref().unwrap_or(&empty);
        let mut spots = Vec::new();
        let mut compare = |snapshot: Option<&(Vec<u8>, Vec<u8>)>, disks: [&Disk; 4]| {
            let [sound, damaged, ours, theirs] = disks;
            for (cluster, before) in sound.iter().enumerate() {
                let content = |disk: &Disk| disk.get(cluster).and_then(|c| c.content);
                let (ours_now, theirs_now) = (content(ours), content(theirs));
                if ours_now != theirs_now {
                    spots.push(Spot {
                        snapshot: snapshot.cloned(),
                        cluster,
                        sound: before.content,
                        damaged: content(damaged),
                        ours: ours_now,
                        theirs: theirs_now,
                        empty: before.empty,
                        is_ours: cluster < ours.len(),
                        is_theirs: cluster < theirs.len(),
                    });
                }
            }
        };
        let disks = [
            &self.sound.active,
            &damaged.active,
            &ours.active,
            &theirs.active,
        ];
        compare(None, disks);
        for (key, disk) in &self.sound.snapshots {
            // A damaged name is the snapshot's name from then on.
            let now = self.name_now(key);
            let of = |guest: &'_ Guest| guest.snapshots.get(&now).cloned();
            let (d, o, t) = (of(damaged), of(ours), of(theirs));
            let or_none = |disk: Option<Disk>| disk.unwrap_or_else(|| none.clone());
            let (d, o, t) = (or_none(d), or_none(o), or_none(t));
            compare(Some(key), [disk, &d, &o, &t]);
        }
        spots
    }

    /// What a snapshot is called in the damaged image.
    fn name_now(&self, key: &(Vec<u8>, Vec<u8>)) -> (Vec<u8>, Vec<u8>) {
        let Some(damaged) = &self.damaged else {
            return key.clone();
        };
        if damaged.snapshots.contains_key(key) {
            return key.clone();
        }
        let known = |other: &&(Vec<u8>, Vec<u8>)| !self.sound.snapshots.contains_key(*other);
        let mut new = damaged.snapshots.keys().filter(known);
        match (new.next(), new.next()) {
            (Some(new), None) => new.clone(),
            _ => key.clone(),
        }
    }
}

fn options() -> Options<'static> {
    Options {
        threads: 1,
        ..Options::default()
    }
}

/// Plans, applies and undoes a repair, and watches what is written.
fn at_level(
    base: &Base,
    shop: &Workshop,
    bytes: &[u8],
    level: Level,
    failures: &mut Vec<String>,
) -> Ours {
    let image = Trace::new(Memory::from(bytes.to_vec()));
    let options = RepairOptions {
        level,
        threads: 1,
        ..RepairOptions::default()
    };
    let mut ours = Ours {
        level,
        hopeless: None,
        plan: String::new(),
        kinds: Vec::new(),
        report: None,
        theirs: None,
        guest: None,
        kept_orphans: false,
        bytes: Vec::new(),
    };
    let made = match plan(&image, &options) {
        Ok(made) => made,
        Err(PlanError::Hopeless(finding)) => {
            ours.hopeless = Some(finding);
            return ours;
        }
        Err(error) => {
            failures.push(format!("{level}: {error}"));
            return ours;
        }
    };
    if !image.events().is_empty() {
        failures.push(format!("planning {level} writes"));
    }
    ours.plan = made.to_string();
    ours.kinds = made
        .actions()
        .iter()
        .map(|action| action.kind.id())
        .collect();
    ours.kept_orphans = made.keeps_orphans();
    let promised = made.after().verdict();
    let file = Memory::new();
    let (writes, len) = (made.writes(), made.new_len());
    made.apply(Some(&file)).unwrap();
    drop(made);
    for event in image.events() {
        let is_told = match &event {
            Event::Write { offset, bytes } => {
                let end = offset + bytes.len() as u64;
                writes.iter().any(|r| r.start <= *offset && end <= r.end)
            }
            Event::SetLen { len: new } => *new == len,
            Event::Flush => true,
            _ => false,
        };
        if !is_told {
            failures.push(format!("{level} does more than its plan says: {event:?}"));
        }
    }
    let report = check(&image, &self::options());
    if report.verdict() != promised {
        let found = report.verdict();
        failures.push(format!("{level} promises {promised:?}, but is {found:?}"));
    }
    ours.report = Some(report);
    let image = image.into_inner();
    ours.bytes = image.to_vec().unwrap();
    shop.write(IMAGE, &ours.bytes);
    ours.theirs = Some(shop.check(IMAGE, base.access));
    ours.guest = guest::read(&ours.bytes);
    undo(&image, &file, false).unwrap();
    if image.to_vec().unwrap() != bytes {
        failures.push(format!("{level} can't be undone"));
    }
    ours
}

/// What `qemu-img check -r all` makes of it.
fn by_qemu(base: &Base, shop: &Workshop, bytes: &[u8]) -> Theirs {
    shop.write(IMAGE, bytes);
    let run = shop.repair(IMAGE, base.access);
    let check = shop.check(IMAGE, base.access);
    let mut args = match base.access {
        Access::Plain => words("-f qcow2"),
        Access::WithSecret => secret_args().to_vec(),
    };
    args.extend(words("-r -c quit"));
    args.push(target(IMAGE, base.access));
    let opens = shop.ask("qemu-io", &args).exit == Some(0);
    let bytes = shop.read_start(IMAGE, READ_BYTES);
    std::fs::remove_file(shop.path(IMAGE)).unwrap();
    Theirs {
        run,
        check,
        opens,
        guest: opens.then(|| guest::read(&bytes)).flatten(),
    }
}
