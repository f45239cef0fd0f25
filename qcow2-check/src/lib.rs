//! qcow2-check
