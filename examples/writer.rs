//! A program whose memory can be moved while it writes: `cargo run --example writer SOCKET`, with the control
//! socket of a sender, and then `memferry migrate …`.
//!
//! The kernel keeps account of what is written, and the program stops by itself when it is asked to. At
//! the end it leaves, since its memory has another owner.
#![allow(clippy::print_stdout, reason = "an example may say that it is ready")]

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use memferry::client::{Connection, Order, Stoppable, Tracked, Tracking};
use memferry::region::{Access, Mapping};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

const PAGE: usize = 4096;
const PAGES: usize = 2048;

fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("name a control socket")?;

    // The memory, and how it is made known.
    let memory = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC)?);
    memory.set_len((PAGES * PAGE) as u64)?;
    let ram = Mapping::new(&memory, PAGES * PAGE, Access::Write)?;
    let tracking = Tracking::Pagemap(Tracked::new(&ram)?);
    let mut control = Connection::connect(Path::new(&socket))?;
    let freeze = json!({"kind": "client"});
    control.register(&"ram".parse()?, memory.as_fd(), &tracking, freeze)?;
    let mut sender = Stoppable::new(control);

    // What the program is there for, and after each write a look at whether it is asked to stop.
    println!("ready");
    let mut wait = Duration::ZERO;
    for count in 1.. {
        match sender.attend(wait)? {
            Order::Write => wait = Duration::ZERO,
            Order::StandStill => wait = Duration::from_secs(1),
            Order::End => break,
        }
        if wait.is_zero() {
            let page = ram.span_mut(count % PAGES * PAGE, PAGE);
            page.ok_or("no such page")?.fill_from(&count.to_le_bytes());
        }
    }
    Ok(())
}
