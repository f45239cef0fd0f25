//! Where the checker deliberately says something else than QEMU, and why.

use qcow2_check::{Code, Report, Verdict};

use super::bases::Base;
use super::damage::{Change, Mutant};
use crate::oracle::Judgement;

/// A damaged image and what both say of it.
#[derive(Debug)]
pub(super) struct Case<'a> {
    pub(super) base: &'a Base,
    pub(super) mutant: &'a Mutant,
    pub(super) theirs: &'a Judgement,
    pub(super) ours: &'a Report,
}

impl Case<'_> {
    /// QEMU's verdict; a check that ended by a signal or not at all is incomplete.
    pub(super) fn their_verdict(&self) -> Verdict {
        match self.theirs.exit {
            Some(0) => Verdict::Sound,
            Some(2) => Verdict::Corrupt,
            Some(3) => Verdict::Leaks,
            _ => Verdict::Incomplete,
        }
    }

    /// Whether QEMU refused to open the image, so that nothing was checked.
    fn is_refusal(&self) -> bool {
        self.theirs.exit == Some(1)
            && self.theirs.counts.is_none()
            && self.theirs.message.contains("Could not open")
    }

    /// Whether the verdict or any count is another one.
    pub(super) fn differs(&self) -> bool {
        self.ours.verdict() != self.their_verdict() || self.counts_differ()
    }

    /// Whether the checker calls the image better than QEMU does. An image that QEMU refuses to open may also be called
    /// corrupt.
    pub(super) fn is_milder(&self) -> bool {
        let verdict = self.ours.verdict();
        verdict < self.their_verdict() && !(self.is_refusal() && verdict == Verdict::Corrupt)
    }

    fn counts_differ(&self) -> bool {
        match self.theirs.counts {
            Some(counts) => counts != self.ours.counts,
            None => false,
        }
    }

    fn has(&self, code: Code) -> bool {
        self.ours.total(code) > 0
    }

    /// Whether the counts are QEMU's, and the verdict is worse because of one of these findings.
    fn only_adds(&self, codes: &[Code]) -> bool {
        !self.counts_differ()
            && self.ours.verdict() > self.their_verdict()
            && codes.iter().any(|code| self.has(*code))
    }

    /// Whether QEMU refused to open the image, and said one of these phrases.
    fn refused_for(&self, phrases: &[&str]) -> bool {
        self.is_refusal() && phrases.iter().any(|p| self.theirs.message.contains(p))
    }
}

/// Why a difference is meant to be.
pub(super) struct Rule {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    /// Whether it is an excuse for a milder verdict, too.
    pub(super) milder: bool,
    pub(super) applies: fn(&Case<'_>) -> bool,
}

/// The rules. The first that applies is taken.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "header",
        why: "a header that QEMU refuses is a finding, and the check goes on",
        milder: false,
        applies: |case| {
            case.is_refusal()
                && [Code::HeaderInvalid, Code::HeaderUnreadable]
                    .iter()
                    .any(|c| case.has(*c))
        },
    },
    Rule {
        name: "bitmaps",
        why: "broken bitmaps, which QEMU refuses to open, don't stop a check",
        milder: false,
        applies: |case| {
            case.refused_for(&["bitmap", "Bitmap"]) && case.ours.verdict() >= Verdict::Corrupt
        },
    },
    Rule {
        name: "LUKS header",
        why: "a broken LUKS header, which QEMU refuses to open, doesn't stop a check",
        milder: false,
        applies: |case| case.is_refusal() && case.has(Code::CryptoInvalid),
    },
    Rule {
        name: "secret",
        why: "a check needs no passphrase and tries none, so it can't tell that none fits",
        milder: true,
        applies: |case| case.refused_for(&["Invalid password", "'encrypt.key-secret' is required"]),
    },
    Rule {
        name: "data file",
        why: "the external data file is never opened, so it need not be there",
        milder: true,
        applies: |case| {
            let named = case.base.name.starts_with("data-file")
                && case.refused_for(&[
                    "No such file",
                    "requires a file name",
                    "File name too long",
                ]);
            named || case.refused_for(&["'data-file' is required"])
        },
    },
    Rule {
        name: "backing file",
        why: "the backing file is never opened, so it need not be there",
        milder: true,
        applies: |case| case.refused_for(&["Could not open backing file"]),
    },
    Rule {
        name: "refcounts past the end",
        why: "QEMU doesn't look at refcounts of clusters behind the end of the file",
        milder: false,
        applies: |case| case.only_adds(&[Code::RefcountPastEnd]),
    },
    Rule {
        name: "external offsets",
        why: "QEMU checks that host and guest offset agree only when it reads",
        milder: false,
        applies: |case| case.only_adds(&[Code::ExternalOffset]),
    },
    Rule {
        name: "zero flag",
        why: "QEMU finds a zero flag where the format has none only when it reads",
        milder: false,
        applies: |case| case.only_adds(&[Code::L2ZeroFlag]),
    },
    Rule {
        name: "snapshot size",
        why: "QEMU doesn't compare a snapshot's sizes with its L1 table",
        milder: false,
        applies: |case| case.only_adds(&[Code::SnapshotSize]),
    },
    Rule {
        name: "header as L2 table",
        why: "QEMU takes the header for an L2 table where an L1 entry has flags only, and counts what it finds there",
        milder: false,
        applies: |case| case.has(Code::L1NoTable),
    },
    Rule {
        name: "LUKS key slots",
        why: "QEMU adds up sectors in 32 bits and misses key material that starts near 2^32",
        milder: false,
        applies: |case| case.only_adds(&[Code::CryptoInvalid]),
    },
    Rule {
        name: "negative length",
        why: "a LUKS area of 2^63 bytes or more has a negative length for QEMU, which counts nothing then",
        milder: false,
        applies: |case| {
            let huge = matches!(case.mutant.change, Change::Poke { new, .. } if new >> 63 == 1);
            huge && case.mutant.structure == "encryption extension"
                && case.has(Code::ReferencePastEnd)
        },
    },
];
