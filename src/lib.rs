//! memferry moves live memory between hosts.
//!
//! A sender splits memory Regions into several streams, lends the pages to the kernel with the
//! zero-copy flag, and flushes at every iteration boundary, so that no page is reused before the
//! kernel is done with it; a receiver puts the Regions together again, bit for bit.
//!
//! `docs/architecture.md` has the map: which file does what, and what each layer must not know.

pub mod affinity;
pub mod assembly;
pub mod channel;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dirty;
pub mod endpoint;
pub mod freeze;
pub mod guardian;
pub mod history;
pub mod iteration;
pub mod journal;
pub mod limits;
pub mod log;
pub mod name;
pub mod notify;
pub mod pages;
pub mod peer;
pub mod populate;
pub mod rates;
pub mod receiver;
pub mod region;
pub mod sender;
pub mod stats;
pub mod stream;
pub mod sys;
pub mod wire;
pub mod workload;
