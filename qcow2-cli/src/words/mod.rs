//! How numbers, lists of options and descriptions of nodes are written on command lines.

pub mod dict;
pub mod getopt;
pub mod json;
pub mod keyval;
pub mod outside;
pub mod size;
pub mod system;
