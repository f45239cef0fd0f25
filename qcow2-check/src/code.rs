//! The catalogue of findings.
//!
//! Every code is stable: it is never renamed and never used for something else. `docs/findings.md` is the same table
//! for people; a test keeps the two equal.

use std::fmt;

use crate::Severity;

macro_rules! catalogue {
    ($( $(#[$doc:meta])* $name:ident = $id:literal, $severity:ident, $qemu:ident, $what:literal, $repair:literal; )*) => {
        /// What kind of thing was found.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $( #[doc = $what] $name, )*
        }

        impl Code {
            /// All codes, in the order of the catalogue.
            pub const ALL: &'static [Self] = &[ $( Self::$name, )* ];

            /// The stable identifier, e.g. `L2-UNALIGNED`.
            pub const fn id(self) -> &'static str {
                match self { $( Self::$name => $id, )* }
            }

            /// How bad a finding of this kind is.
            pub const fn severity(self) -> Severity {
                match self { $( Self::$name => Severity::$severity, )* }
            }

            /// What it means, in plain words.
            pub const fn explanation(self) -> &'static str {
                match self { $( Self::$name => $what, )* }
            }

            /// What would repair it.
            pub const fn repair(self) -> &'static str {
                match self { $( Self::$name => $repair, )* }
            }

            /// Whether `qemu-img check` counts such a finding, too.
            pub const fn counted_by_qemu(self) -> bool {
                match self { $( Self::$name => catalogue!(@ $qemu), )* }
            }
        }
    };
    (@ qemu) => { true };
    (@ beyond) => { false };
}

catalogue! {
    // Header and extensions.
    HeaderUnreadable = "HEADER-UNREADABLE", Error, qemu,
        "The file can't be taken for a qcow2 image: the header is not one, or says something that leaves nothing to check.",
        "Restore the header from a backup, or rebuild it from the structures found in the file.";
    HeaderInvalid = "HEADER-INVALID", Corruption, beyond,
        "A field or extension of the header breaks the format's rules. QEMU refuses to open such an image; the check went on without it.",
        "Rewrite the header with the field corrected or the extension dropped.";
    HeaderOdd = "HEADER-ODD", Note, beyond,
        "A field of the header breaks a rule of the format, but readers cope with it.",
        "The next rewrite of the header corrects it.";
    RefcountTableEmpty = "REFCOUNT-TABLE-EMPTY", Corruption, beyond,
        "The header gives the refcount table no cluster. QEMU opens such an image for checking only.",
        "Rebuild the refcount structures.";
    FeatureDirty = "FEATURE-DIRTY", Note, beyond,
        "The dirty bit is set: the image was not closed cleanly while refcounts were postponed.",
        "Check with repair; the bit is cleared when the refcounts are right.";
    FeatureCorrupt = "FEATURE-CORRUPT", Note, beyond,
        "The corrupt bit is set: a writer found damage and stopped. Nothing may be written before a repair.",
        "Check with repair; the bit is cleared when nothing is wrong any more.";
    FeatureUnknown = "FEATURE-UNKNOWN", Error, qemu,
        "Unknown incompatible feature bits are set: what they mean for the other structures can't be known, so nothing was checked.",
        "Use a program that knows the feature, or clear the bits if they are damage.";
    AutoclearUnknown = "AUTOCLEAR-UNKNOWN", Note, beyond,
        "Unknown autoclear bits are set. A writer that does not know them clears them.",
        "None needed.";
    AutoclearBitmaps = "AUTOCLEAR-BITMAPS", Note, beyond,
        "The autoclear bit for bitmaps is set, but there is no bitmaps extension.",
        "Clear the bit.";
    HeaderJunk = "HEADER-JUNK", Note, beyond,
        "Bytes that nothing describes follow the header's extensions in cluster 0, or its padding is not zero.",
        "The next rewrite of the header clears them.";
    FeatureNamesInvalid = "FEATURE-NAMES-INVALID", Note, beyond,
        "An entry of the feature name table names a kind or bit that can't exist.",
        "The next rewrite of the header replaces the table.";
    SizeUnaligned = "SIZE-UNALIGNED", Note, beyond,
        "The virtual size is no multiple of 512; readers round it down.",
        "Resize to a multiple of 512.";

    // References in general.
    ReferencePastEnd = "REFERENCE-PAST-END", Corruption, qemu,
        "A reference leads a cluster or more past the end of the file. It is not counted.",
        "Restore the truncated part of the file, or drop the reference; what it mapped is lost.";
    RefcountOverflow = "REFCOUNT-OVERFLOW", Corruption, qemu,
        "A cluster has more references than the refcount width can express.",
        "Widen the refcounts, or copy the image.";

    // L1 and L2.
    L1Reserved = "L1-RESERVED", Corruption, qemu,
        "An L1 entry has reserved bits set.",
        "Clear the bits.";
    L1Unaligned = "L1-UNALIGNED", Corruption, qemu,
        "An L1 entry points at an L2 table that does not start at a cluster.",
        "Drop the entry, or correct it to the table it meant.";
    L1NoTable = "L1-NO-TABLE", Corruption, beyond,
        "An L1 entry has flags but no L2 table; QEMU's checker takes the header for one.",
        "Clear the entry.";
    L1Unreadable = "L1-UNREADABLE", Error, qemu,
        "An L1 table could not be read.",
        "Restore the file; the reason is with the storage.";
    L2Unreadable = "L2-UNREADABLE", Error, qemu,
        "An L2 table could not be read.",
        "Restore the file; the reason is with the storage.";
    L2Shared = "L2-SHARED", Corruption, beyond,
        "One L2 table serves several places of the disk; a write to one shows up at the others.",
        "Copy the table and its clusters for each place.";
    L2Reserved = "L2-RESERVED", Corruption, qemu,
        "An L2 entry has reserved bits set.",
        "Clear the bits.";
    L2ZeroFlag = "L2-ZERO-FLAG", Corruption, beyond,
        "An L2 entry has the zero flag where the image has none (version 2, or extended entries). Reading it fails.",
        "Clear the flag, or make the cluster read as zero in the way the image allows.";
    L2Unaligned = "L2-UNALIGNED", Corruption, qemu,
        "An L2 entry points at a data cluster that does not start at a cluster. Reading it fails.",
        "Drop the entry; the right place can't be known.";
    L2UnalignedZero = "L2-UNALIGNED-ZERO", Corruption, qemu,
        "An L2 entry that holds no data points at a place that does not start at a cluster.",
        "Drop the host offset; the cluster reads as zero all the same.";
    CompressedCopied = "COMPRESSED-COPIED", Corruption, qemu,
        "A compressed L2 entry has the COPIED flag.",
        "Clear the flag.";
    CompressedExternal = "COMPRESSED-EXTERNAL", Corruption, qemu,
        "An image with an external data file has a compressed cluster, which can't be read.",
        "Drop the entry.";
    CompressedSubclusters = "COMPRESSED-SUBCLUSTERS", Corruption, qemu,
        "A compressed L2 entry has subcluster bits. QEMU does not count its clusters and would free them in a repair.",
        "Clear the bits.";
    CompressedOffset = "COMPRESSED-OFFSET", Corruption, beyond,
        "A compressed L2 entry has offset bits that no host offset may have.",
        "Drop the entry.";
    CompressedUndecodable = "COMPRESSED-UNDECODABLE", Corruption, beyond,
        "The compressed data of a guest cluster does not decode: reading the cluster fails. Only a deep check looks at that.",
        "Restore the cluster from a backup or from a copy of the image; its content is lost here.";
    CompressedUnchecked = "COMPRESSED-UNCHECKED", Error, beyond,
        "A deep check was asked for, but compressed data could not be decoded for a reason that is not its own.",
        "See to the storage or use a build that has the decoder, and check again.";
    SubclusterConflict = "SUBCLUSTER-CONFLICT", Corruption, qemu,
        "An extended L2 entry calls a subcluster both allocated and zero. Reading the cluster fails.",
        "Clear one of the two bits.";
    SubclusterUnallocated = "SUBCLUSTER-UNALLOCATED", Corruption, qemu,
        "An extended L2 entry has allocated subclusters but no host cluster. Reading the cluster fails.",
        "Clear the bits; the data is lost.";
    CopiedWrong = "COPIED-WRONG", Corruption, qemu,
        "The COPIED flag of an active entry does not agree with the refcount: a writer would overwrite what a snapshot holds, or copy for nothing.",
        "Set the flag by the refcount.";
    CopiedStale = "COPIED-STALE", Note, beyond,
        "Entries of inactive tables have the COPIED flag though their clusters are shared. It means nothing there and is set right when the snapshot is applied.",
        "None needed.";
    DataShared = "DATA-SHARED", Corruption, beyond,
        "Two places of the disk lie on one host cluster; a write to one shows up at the other.",
        "Copy the cluster for the second place; which one the content belongs to must be judged.";
    CompressedOnData = "COMPRESSED-ON-DATA", Note, beyond,
        "Compressed data claims a cluster that holds other data of the disk, mostly since its entry gives more sectors than it has. As long as refcounts and flags say that the cluster is shared, nothing is written there in place, so nothing is damaged.",
        "None needed; `salvage` gives the other data a place of its own.";
    DataOnMetadata = "DATA-ON-METADATA", Corruption, beyond,
        "Guest data lies on metadata: a write by the guest destroys the image, and a write of metadata the guest's data.",
        "Copy the cluster for the guest; metadata keeps its place.";
    MetadataOverlap = "METADATA-OVERLAP", Corruption, beyond,
        "Two structures lie on the same clusters.",
        "Move one of them; which one is intact must be judged.";
    BeyondDisk = "BEYOND-DISK", Note, beyond,
        "L2 entries map space between the end of the disk and the VM state; nobody can see it.",
        "Discard the clusters.";
    VmStateActive = "VM-STATE-ACTIVE", Note, beyond,
        "The active L1 table maps VM state. Growing the disk would show it to the guest.",
        "Discard it, unless a save is under way.";
    ExternalOffset = "EXTERNAL-OFFSET", Corruption, beyond,
        "An entry of an image with an external data file gives a host offset other than its guest offset. Reading it fails.",
        "Set the offset to the guest offset.";

    // Refcounts.
    Leak = "LEAK", Leak, qemu,
        "A cluster's refcount is higher than its references: the space is lost until the refcount is corrected.",
        "Lower the refcount, once nothing else is wrong that could hide references.";
    RefcountLow = "REFCOUNT-LOW", Corruption, qemu,
        "A cluster has more references than its refcount says: freeing one would free it under the others.",
        "Raise the refcount, if the references are right.";
    RefcountMissing = "REFCOUNT-MISSING", Corruption, qemu,
        "A cluster is in use, but its refcount is 0: it may be handed out again and overwritten.",
        "Raise the refcount, or rebuild the refcount structures.";
    RefcountUnreadable = "REFCOUNT-UNREADABLE", Error, qemu,
        "The refcounts of these clusters can't be read, since their refcount block can't.",
        "Rebuild the refcount structures.";
    RefcountPastEnd = "REFCOUNT-PAST-END", Leak, beyond,
        "Clusters past the end of the file have refcounts.",
        "Set them to 0.";
    RefcountTableReserved = "REFCOUNT-TABLE-RESERVED", Corruption, qemu,
        "A refcount table entry has reserved bits set.",
        "Clear the bits.";
    RefcountBlockUnaligned = "REFCOUNT-BLOCK-UNALIGNED", Corruption, qemu,
        "A refcount table entry points at a block that does not start at a cluster.",
        "Rebuild the refcount structures.";
    RefcountBlockPastEnd = "REFCOUNT-BLOCK-PAST-END", Corruption, qemu,
        "A refcount block lies past the end of the file.",
        "Rebuild the refcount structures.";
    RefcountBlockShared = "REFCOUNT-BLOCK-SHARED", Corruption, qemu,
        "A refcount block's cluster is used by something else, too, or by another part of the refcount table.",
        "Rebuild the refcount structures.";

    // Snapshots.
    SnapshotTableUnreadable = "SNAPSHOT-TABLE-UNREADABLE", Error, qemu,
        "The snapshot table can't be read: position, count or an entry is out of bounds.",
        "Repair the table; without it no leak may be freed, since snapshots could own it.";
    SnapshotIncomplete = "SNAPSHOT-INCOMPLETE", Corruption, qemu,
        "A snapshot of a version 3 image lacks the 64-bit VM state size or the disk size.",
        "Rewrite the table with both.";
    SnapshotL1Invalid = "SNAPSHOT-L1-INVALID", Corruption, qemu,
        "A snapshot's L1 table is not aligned or too large. Its references are not counted.",
        "Correct the entry; until then nothing may be freed.";
    SnapshotExternal = "SNAPSHOT-EXTERNAL", Corruption, qemu,
        "An image with an external data file has snapshots; QEMU can't use them.",
        "Delete the snapshots.";
    SnapshotDuplicate = "SNAPSHOT-DUPLICATE", Note, beyond,
        "Two snapshots have the same id or name, or one has none; commands may meet the wrong one.",
        "Give each its own id and name.";
    SnapshotSize = "SNAPSHOT-SIZE", Corruption, beyond,
        "A snapshot's disk or VM state is larger than its L1 table can map.",
        "Correct the size, or treat the rest as lost.";

    // Bitmaps.
    BitmapsInvalid = "BITMAPS-INVALID", Corruption, beyond,
        "A bitmap or the bitmap directory breaks the format's rules. QEMU can't open the image at all.",
        "Drop the bitmap, or all bitmaps if the directory can't be walked.";
    BitmapOdd = "BITMAP-ODD", Note, beyond,
        "A bitmap breaks a rule of the format, but readers cope with it.",
        "Remove the bitmap and add it anew.";
    BitmapsUntrusted = "BITMAPS-UNTRUSTED", Note, beyond,
        "There is a bitmaps extension, but a writer without bitmap support has changed the image since: the bitmaps are void and their clusters leak.",
        "Drop the extension and free the clusters.";
    BitmapInUse = "BITMAP-IN-USE", Note, beyond,
        "A bitmap is marked in use: an open writer holds it, or a crash left it stale.",
        "Remove the bitmap, or mark all of it dirty.";
    BitmapTableReserved = "BITMAP-TABLE-RESERVED", Corruption, qemu,
        "A bitmap table entry has reserved bits set or is not aligned.",
        "Clear the bits, or mark the part dirty.";
    BitmapTailBits = "BITMAP-TAIL-BITS", Note, beyond,
        "Bits behind the end of the disk are set in a bitmap.",
        "Clear them.";

    // Encryption.
    CryptoInvalid = "CRYPTO-INVALID", Corruption, beyond,
        "The LUKS header breaks the rules; the disk can't be unlocked as it is.",
        "Restore the LUKS header from a backup.";
    CryptoOdd = "CRYPTO-ODD", Note, beyond,
        "The LUKS header breaks a rule of the format, but readers cope with it.",
        "None needed.";

    // The file.
    DataPastImage = "DATA-PAST-IMAGE", Note, beyond,
        "The file goes on with data behind the last cluster the image uses: left over from freed clusters, or hidden there.",
        "Truncate the file to the image's end.";
    ReadFailed = "READ-FAILED", Error, beyond,
        "The storage could not give some bytes of metadata, though it could at another time of the check.",
        "See to the storage and check again.";
    CheckLimited = "CHECK-LIMITED", Error, beyond,
        "The image claims so much more than it can hold that part of the check was cut off.",
        "Mend the other findings first and check again.";

    // Hazards.
    BackingReference = "BACKING-REFERENCE", Note, beyond,
        "The image names a backing file.",
        "None needed; whoever opens the image must decide whether to follow.";
    BackingAbsolute = "BACKING-ABSOLUTE", Hazard, beyond,
        "The backing file is named by an absolute path: opening the image opens a file of the host's.",
        "Rebase to a name beside the image, or open without following.";
    BackingEscapes = "BACKING-ESCAPES", Hazard, beyond,
        "The backing file's name leaves the image's directory.",
        "Rebase to a name beside the image, or open without following.";
    BackingProtocol = "BACKING-PROTOCOL", Hazard, beyond,
        "The backing file's name is a json: description or has a protocol prefix: opening it can reach devices and servers.",
        "Rebase to a plain file name, or open without following.";
    BackingOddName = "BACKING-ODD-NAME", Hazard, beyond,
        "The backing file's name has control characters or a NUL, or is no UTF-8: programs will read it differently.",
        "Rebase to a plain name.";
    BackingProbed = "BACKING-PROBED", Hazard, beyond,
        "The backing file's format is not recorded: a reader would guess it from content that a guest may have written.",
        "Record the format by a rebase.";
    BackingFormatOdd = "BACKING-FORMAT-ODD", Hazard, beyond,
        "The recorded format of the backing file is none that disk images have.",
        "Record the right format by a rebase.";
    BackingMissing = "BACKING-MISSING", Hazard, beyond,
        "The backing file can't be opened; reading from the image will fail.",
        "Bring the file back, or rebase.";
    BackingLoop = "BACKING-LOOP", Hazard, beyond,
        "The chain of backing files comes back to itself; opening it never ends.",
        "Rebase one of the files.";
    BackingDeep = "BACKING-DEEP", Hazard, beyond,
        "The chain of backing files is deeper than the limit.",
        "Commit or rebase to shorten the chain.";
    BackingWithRaw = "BACKING-WITH-RAW", Corruption, beyond,
        "The image has a backing file, though its external data file is said to be a complete raw image.",
        "Drop the backing file or the raw flag.";
    ExternalData = "EXTERNAL-DATA", Hazard, beyond,
        "Guest data lies in another file that the image names: opening the image opens that file of the host's, for writing, too.",
        "Open with a data file of your own choice, or refuse the image.";
    ExternalDataUnnamed = "EXTERNAL-DATA-UNNAMED", Note, beyond,
        "Guest data lies in another file, which the image does not name; the user must.",
        "None needed.";
    ExternalNameUnused = "EXTERNAL-NAME-UNUSED", Hazard, beyond,
        "The image names an external data file but does not say that it uses one.",
        "Drop the name.";
    HugeDisk = "HUGE-DISK", Hazard, beyond,
        "The virtual size is absurd for such a file; whoever allocates by it is in trouble.",
        "Resize, or refuse the image.";
    HugeTable = "HUGE-TABLE", Hazard, beyond,
        "A table is said to be far larger than the file; a reader that allocates by it is in trouble.",
        "Refuse the image.";
    FanIn = "FAN-IN", Hazard, beyond,
        "Very many references lead to one table: a program that follows each of them works for hours.",
        "Refuse the image.";
    ManySnapshots = "MANY-SNAPSHOTS", Hazard, beyond,
        "There are thousands of snapshots; programs that walk each of them work for long.",
        "Delete snapshots.";
    CryptoWork = "CRYPTO-WORK", Hazard, beyond,
        "The LUKS header asks for so many iterations that unlocking takes minutes or hours.",
        "Change the key with a sane iteration time, or refuse the image.";
    CryptoLegacy = "CRYPTO-LEGACY", Note, beyond,
        "The image uses the legacy AES encryption, which is weak and has no key check.",
        "Convert to LUKS.";
    CompressedEncrypted = "COMPRESSED-ENCRYPTED", Hazard, beyond,
        "An encrypted image has compressed clusters, which are always stored in clear text.",
        "Rewrite these clusters.";
}

impl Code {
    /// The code with this identifier, in upper or lower case.
    pub fn from_id(id: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.id().eq_ignore_ascii_case(id))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}
