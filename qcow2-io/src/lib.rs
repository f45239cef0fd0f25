//! Where the bytes lie: the [`Storage`] trait, its backends and its wrappers.
//!
//! A storage is a flat, addressable, flushable range of bytes. [`File`] is a host file or block device, [`Memory`] and
//! [`Null`] need no disk; [`Slice`], [`Faulty`], [`Trace`] and [`Blocking`] wrap any other. Nothing here knows what the bytes mean.
#![deny(unsafe_code)]

mod batch;
mod blocking;
#[cfg(feature = "encryption")]
pub mod cipher;
pub mod codec;
#[cfg(any(test, feature = "test-utils"))]
pub mod conformance;
mod error;
mod extent;
mod faulty;
mod file;
mod memory;
mod null;
mod selection;
mod slice;
mod storage;
mod sys;
mod trace;
#[cfg(feature = "io-uring")]
mod uring;

pub use batch::{Op, Request};
pub use blocking::{Blocking, Pause, PauseHandle};
pub use error::{Operation, Result, StorageError, StorageErrorKind};
pub use extent::{Extent, ExtentKind};
pub use faulty::{Fault, Faulty};
pub use file::{File, FileIdentity, FileOptions, LockMode};
pub use memory::Memory;
pub use null::Null;
pub use slice::Slice;
pub use storage::{Limits, MAX_LEN, Storage, ZeroFlags};
pub use trace::{Event, Trace, replay};
#[cfg(feature = "io-uring")]
pub use uring::Uring;

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
