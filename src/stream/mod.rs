//! A stream: one OS thread, one Channel, packets in order.
//!
//! Two barriers end an Iteration on every stream, and they are different facts: *released* (`flush`:
//! the kernel reads none of our pages any more) and *applied* (the receiver has acknowledged the
//! mark). The sender starts the next Iteration only when every stream has both: a page may travel on
//! stream 0 now and on stream 3 next time, and the older copy must land first (rules 1 and 2).
//!
//! Which pages go where is `iteration`'s business; agreeing and committing is the conversation's.

mod checksum;
mod codec;
mod compression;
mod error;
mod incoming;
mod inspect;
mod lending;
mod outgoing;
mod owed;
mod pace;
mod packing;
mod window;

pub use error::StreamError;
pub use incoming::{Destination, IncomingSetup, IncomingStream};
pub use inspect::is_zero;
pub use lending::{Fallback, FirstSends, Tell};
pub use outgoing::{Job, OutgoingStream, Pass, Report, StreamSetup};
pub use owed::{InFlight, Owed};
pub use pace::Pace;
