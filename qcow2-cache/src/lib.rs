//! Metadata in memory: table slices, the order in which they reach the disk, and the map of where metadata lies.
#![forbid(unsafe_code)]
