//! Where a repair here and QEMU's end differently, and why.

use qcow2_check::{Code, Structure, Verdict};

use super::case::{Case, Spot};

type Left = fn(&Case<'_>) -> bool;
type Differs = fn(&Case<'_>, &Spot) -> bool;

/// A difference with a name.
pub(super) struct Rule<F> {
    pub(super) name: &'static str,
    pub(super) why: &'static str,
    pub(super) applies: F,
}

/// Why `all` leaves an image that not both checkers call clean. The first that applies is taken.
pub(super) const LEFT: &[Rule<Left>] = &[
    Rule {
        name: "nothing there",
        why: "the file ends before its tables, or its header; no search finds any",
        applies: |case| case.all.hopeless.is_some() && case.salvage.hopeless.is_some(),
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
            let is_l1 = case.all.hopeless.as_ref().is_some_and(|finding| {
                [Code::ReferencePastEnd, Code::L1Unreadable].contains(&finding.code)
                    && finding.place.structure == Structure::ActiveL1
            });
            (is_l1 || case.is_hopeless_for(Code::HeaderUnreadable, &[40]))
                && (case.salvage.is_clean() || case.leaks_with_data_file(&case.salvage))
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
        why: "encrypted clusters of a LUKS image stay where they are without the key, since they are decrypted by their place",
        applies: |case| {
            let shared = [Code::DataShared, Code::DataOnMetadata];
            case.base.name == "luks" && shared.iter().any(|code| case.all.has(*code))
        },
    },
    Rule {
        name: "leaks with data file",
        why: "an image with an external data file has no snapshots, so what lost its references stays as leaks",
        applies: |case| case.leaks_with_data_file(&case.all),
    },
    Rule {
        name: "other file",
        why: "the header names another backing or data file, or another cipher, than it did; which it was nobody knows",
        applies: |case| {
            let words = [
                "'data-file' is required",
                "Could not open backing file",
                "No such file or directory",
                "requires a file name",
                "File name too long",
                "'encrypt.key-secret' is required",
            ];
            case.all.verdict() == Verdict::Sound && words.iter().any(|words| case.all.says(words))
        },
    },
];

/// Why a place of the disk reads otherwise than after QEMU's repair. The first that applies is taken.
pub(super) const SPOTS: &[Rule<Differs>] = &[
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
        why: "the L1 table is gone: QEMU's disk reads as if nothing had ever been written, here it reads as the tables that were found say, which the plan calls ambiguous",
        applies: |case, spot| {
            let found = ["FIND-L1", "MAKE-L1", "FIND-L2"];
            case.all.hopeless.is_some()
                && found.iter().any(|kind| case.salvage.did(kind))
                && case.salvage.plan.contains("ambiguous")
                && spot.theirs == spot.empty
        },
    },
    Rule {
        name: "unchanged",
        why: "it reads as in the damaged image here; QEMU's repair has put something of its own where it leads, or given it up",
        applies: |_, spot| spot.is_ours && spot.ours == spot.damaged && spot.theirs != spot.sound,
    },
    Rule {
        name: "foreign",
        why: "a table or a cluster that is somebody else's: QEMU leaves it to both, so the guest reads, and overwrites, what is not its own; here it is given up and reads as nothing, or is a copy",
        applies: |case, spot| {
            let given_up = [
                "DROP-L1-ENTRY",
                "DROP-L2-ENTRY",
                "COPY-CLUSTER",
                "COPY-TABLE",
            ];
            given_up.iter().any(|kind| case.ours().did(kind))
                && spot.theirs == spot.damaged
                && spot.theirs != spot.sound
        },
    },
    Rule {
        name: "dropped snapshot",
        why: "nothing of a snapshot's tables can be found; QEMU keeps its name, stays corrupt, and its disk reads as if nothing had ever been written",
        applies: |case, spot| {
            spot.snapshot.is_some()
                && !spot.is_ours
                && case.ours().did("DROP-SNAPSHOT")
                && case.theirs.check.exit != Some(0)
                && spot.theirs == spot.empty
        },
    },
];

/// The names of all differences, and why each is there.
pub(super) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    let left = LEFT.iter().map(|rule| (rule.name, rule.why));
    left.chain(SPOTS.iter().map(|rule| (rule.name, rule.why)))
}
