//! Where a repair here and QEMU's end differently, and why.

use qcow2_check::{Code, Structure, Verdict};

use super::case::{Case, Spot};

/// A difference with a name.
pub(super) struct Rule<F> {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    pub(super) applies: F,
}

/// Why `all` leaves an image that not both checkers call clean. The first that applies is taken.
pub(super) const LEFT: &[Rule<fn(&Case<'_>) -> bool>] = &[
    Rule {
        name: "nothing there",
        why: "the file ends before its tables, or its header; no search finds any",
        applies: |case| case.all.hopeless.is_some() && case.salvage.hopeless.is_some(),
    },
    Rule {
        name: "no qcow2 image",
        why: "magic bytes, version or size of clusters say that it is none; `salvage` finds out what they were",
        applies: |case| {
            case.is_hopeless_for(Code::HeaderUnreadable, &[0, 4, 20]) && case.salvage.is_clean()
        },
    },
    Rule {
        name: "unknown features",
        why: "an image may have features that are not known here; `salvage` takes them for damage",
        applies: |case| {
            case.is_hopeless_for(Code::FeatureUnknown, &[72]) && case.salvage.is_clean()
        },
    },
    Rule {
        name: "no L1 table",
        why: "the header leads to no L1 table; `salvage` searches for it",
        applies: |case| {
            let found = case.is_hopeless_for(Code::HeaderUnreadable, &[40])
                || case.all.hopeless.as_ref().is_some_and(|finding| {
                    finding.code == Code::ReferencePastEnd
                        && finding.place.structure == Structure::ActiveL1
                });
            found && case.salvage.is_clean()
        },
    },
    Rule {
        name: "key material",
        why: "damaged key material can't be made anew",
        applies: |case| case.all.has(Code::CryptoInvalid),
    },
    Rule {
        name: "passphrase",
        why: "damaged key material fits no passphrase; neither check nor repair tries one",
        applies: |case| {
            case.base.name == "luks"
                && case.all.verdict() == Verdict::Sound
                && case.all.says("Invalid password")
        },
    },
    Rule {
        name: "ciphertext",
        why: "encrypted clusters stay where they are, since they are decrypted by their place",
        applies: |case| {
            let shared = [Code::DataShared, Code::DataOnMetadata];
            case.base.name == "luks" && shared.iter().any(|code| case.all.has(*code))
        },
    },
    Rule {
        name: "leaks with data file",
        why: "an image with an external data file has no snapshots, so what lost its references stays as leaks",
        applies: |case| {
            case.base.name.starts_with("data-file")
                && case.all.kept_orphans
                && case.all.verdict() == Verdict::Leaks
        },
    },
];

/// Why a place of the disk reads otherwise than after QEMU's repair. The first that applies is taken.
pub(super) const SPOTS: &[Rule<fn(&Case<'_>, &Spot) -> bool>] = &[
    Rule {
        name: "kept",
        why: "it reads as before the damage here, and otherwise or not at all after QEMU's repair",
        applies: |_, spot| spot.ours == spot.sound && spot.theirs != spot.sound,
    },
    Rule {
        name: "closed",
        why: "QEMU can't open its result",
        applies: |case, _| !case.theirs.opens,
    },
    Rule {
        name: "error",
        why: "QEMU's result has an error for the guest there",
        applies: |_, spot| spot.theirs.is_none() && spot.is_theirs,
    },
    Rule {
        name: "empty disk",
        why: "no table is left; QEMU's result is corrupt, and its disk reads as if nothing had ever been written",
        applies: |case, spot| {
            case.salvage.hopeless.is_some()
                && case.theirs.check.exit != Some(0)
                && spot.theirs == spot.empty
        },
    },
    Rule {
        name: "guessed",
        why: "the L1 table is gone: QEMU's disk reads as if nothing had ever been written, here L2 tables are put in the order of the file, which the plan calls ambiguous",
        applies: |case, spot| {
            case.all.hopeless.is_some() && case.salvage.did("MAKE-L1") && spot.theirs == spot.empty
        },
    },
];

/// The names of all differences, and why each is there.
pub(super) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    let left = LEFT.iter().map(|rule| (rule.name, rule.why));
    left.chain(SPOTS.iter().map(|rule| (rule.name, rule.why)))
}
