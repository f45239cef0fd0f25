//! qcow2-io
