//! The fixed structures as they lie in the file: any bytes are a value, and every byte is a field.

mod header;

pub use header::{BitmapsExtension, CryptoExtension, Header};
