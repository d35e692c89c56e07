//! The unsafe edge towards the kernel: system calls that nix has no safe form for.
//!
//! Each file wraps one group of calls in functions that are safe to call; nothing here decides
//! anything. Policy lives in the callers.

pub mod copy;
pub mod errqueue;
pub mod file;
pub mod link;
pub mod msg;
pub mod numa;
pub mod pagemap;
pub mod process;
pub mod procmap;
pub mod sched;
pub mod scm;
pub mod tcp;
pub mod terminal;
pub mod uffd;
pub mod uring;
pub mod wake;
