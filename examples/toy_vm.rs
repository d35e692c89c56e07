//! A toy machine that is handed over while it runs: what a virtual machine monitor has to do.
//!
//! ```text
//! toy_vm source      --sender SOCKET --uri URI   runs the machine and has it moved
//! toy_vm destination --receiver SOCKET           waits for it, and runs it on
//! ```
//!
//! The machine is RAM, and device state: how many steps each vCPU has made. A step computes a word from
//! the vCPU's last one and writes it behind it, so one wrong word of RAM makes every later one wrong.
//! The source stops itself when the sender asks (freeze `client`), and gives its device state with the
//! answer; the destination has the RAM arrive in memory that it has prepared.
#![allow(clippy::print_stdout, reason = "an example tells what it does")]

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use memferry::client::{Connection, Tracked, Tracking};
use memferry::name::Name;
use memferry::region::{Access, Mapping};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

const VCPUS: usize = 4;
/// Words of RAM that each vCPU writes round and round.
const WORDS: usize = 1 << 16;
const WORD: usize = 8;

/// Steps that each vCPU makes before the machine is moved, and at least once more after it.
const STEPS: u64 = 100_000;

/// Name of the Region, and of the transfer.
const NAME: &str = "toy-vm";
const DEADLINE: Duration = Duration::from_secs(60);

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Memory that can be shared, and cannot shrink under whoever maps it.
fn memory(words: usize) -> Outcome<(File, Arc<Mapping>)> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create("toy-vm", flags)?);
    file.set_len((words * WORD) as u64)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    let mapping = Mapping::new(&file, words * WORD, Access::Write)?;
    Ok((file, mapping))
}

/// The machine: its RAM, and a step counter per vCPU as its device state.
struct Machine {
    ram: Arc<Mapping>,
    registers: [AtomicU64; VCPUS],
    /// The vCPUs stand still, or are about to.
    paused: AtomicBool,
}

impl Machine {
    fn new(ram: Arc<Mapping>, steps: [u64; VCPUS]) -> Self {
        Self {
            ram,
            registers: steps.map(AtomicU64::new),
            paused: AtomicBool::new(false),
        }
    }

    /// Runs one vCPU until it is paused, or has made so many steps in all.
    fn run(&self, vcpu: usize, until: u64) {
        let ram = &self.ram.words()[vcpu * WORDS..][..WORDS];
        let counter = &self.registers[vcpu];
        let mut step = counter.load(Acquire);
        while step < until && !self.paused.load(Acquire) {
            let before = ram[slot(step + WORDS as u64 - 1)].load(Acquire);
            ram[slot(step)].store(next(before, step), Release);
            step += 1;
            counter.store(step, Release);
        }
    }

    /// Runs all vCPUs while `meanwhile` does; it pauses them when it is done.
    fn run_while<T>(&self, meanwhile: impl FnOnce() -> T) -> T {
        self.paused.store(false, Release);
        std::thread::scope(|scope| {
            for vcpu in 0..VCPUS {
                scope.spawn(move || self.run(vcpu, u64::MAX));
            }
            let result = meanwhile();
            self.paused.store(true, Release);
            result
        })
    }

    fn steps(&self) -> [u64; VCPUS] {
        self.registers.each_ref().map(|steps| steps.load(Acquire))
    }

    /// Whether RAM is what these steps leave behind, computed anew from the first one.
    fn is_right(&self) -> bool {
        (0..VCPUS).all(|vcpu| {
            let mut want = vec![0; WORDS];
            for step in 0..self.steps()[vcpu] {
                want[slot(step)] = next(want[slot(step + WORDS as u64 - 1)], step);
            }
            let ram = self.ram.words()[vcpu * WORDS..][..WORDS].iter();
            ram.map(|word| word.load(Acquire)).eq(want)
        })
    }
}

/// Where a step writes.
fn slot(step: u64) -> usize {
    usize::try_from(step % WORDS as u64).unwrap_or(0)
}

/// A word that depends on everything before it (the finaliser of SplitMix64).
fn next(before: u64, step: u64) -> u64 {
    let mut x = before
        .wrapping_add(step)
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Runs the machine, has it moved once every vCPU has done something, and ends when it runs elsewhere.
fn source(sender: &Path, uri: &str) -> Outcome<()> {
    let (ram_file, ram) = memory(VCPUS * WORDS)?;
    let machine = Machine::new(ram, [0; VCPUS]);
    let tracking = Tracking::Pagemap(Tracked::new(&machine.ram)?);
    let mut connection = Connection::connect(sender)?;
    let freeze = json!({"kind": "client"});
    connection.register(&Name::new(NAME)?, ram_file.as_fd(), &tracking, freeze)?;
    machine.run_while(|| {
        let started = Instant::now();
        while machine.steps().iter().any(|steps| *steps < STEPS) && started.elapsed() < DEADLINE {
            std::thread::yield_now();
        }
        let order = json!({"uri": uri, "id": NAME, "regions": [NAME]});
        connection.execute("migrate", order)?;
        wait(&mut connection, "pre-switchover")
    })?;
    // Every vCPU has ended behind its last step: this is the state to go on from.
    let mut state = File::from(memfd_create("device-state", MFdFlags::MFD_CLOEXEC)?);
    for steps in machine.steps() {
        state.write_all(&steps.to_le_bytes())?;
    }
    connection.send_fd("device-state", state.as_fd())?;
    let answer = json!({"id": NAME, "state": "pre-switchover", "fdname": "device-state"});
    connection.execute("migrate-continue", answer)?;
    wait(&mut connection, "completing")?;
    let answer = json!({"id": NAME, "state": "completing"});
    connection.execute("migrate-continue", answer)?;
    wait(&mut connection, "completed")?;
    println!("{}", json!({"left": machine.steps()}));
    Ok(())
}

/// Waits until the machine's transfer is in this state. One that fails is an error here; a
/// real machine would go on.
fn wait(connection: &mut Connection, wanted: &str) -> Outcome<()> {
    loop {
        let event = connection.next_event(DEADLINE)?.ok_or("nothing happens")?;
        match event.data["status"].as_str() {
            _ if event.data["id"] != NAME || event.data["regions"].is_null() => {}
            Some(status) if status == wanted => return Ok(()),
            Some("failed" | "cancelled") => return Err("the machine stays where it was".into()),
            _ => {}
        }
    }
}

/// Gives its RAM to the receiver, waits for the machine, and runs it on from where it was.
fn destination(receiver: &Path) -> Outcome<()> {
    let (ram_file, ram) = memory(VCPUS * WORDS)?;
    let mut connection = Connection::connect(receiver)?;
    connection.send_fd("ram", ram_file.as_fd())?;
    connection.execute("region-add", json!({"name": NAME, "fdname": "ram"}))?;
    println!("prepared");
    wait(&mut connection, "completed")?;
    let (_, state) = connection.execute_for_fd("blob-take", json!({"id": NAME}))?;
    let mut counters = Vec::new();
    File::from(state).read_to_end(&mut counters)?;
    connection.execute("blob-del", json!({"id": NAME}))?;

    let mut arrived = [0; VCPUS];
    for (steps, bytes) in arrived.iter_mut().zip(counters.chunks_exact(WORD)) {
        *steps = u64::from_le_bytes(bytes.try_into()?);
    }
    let machine = Machine::new(ram, arrived);
    std::thread::scope(|scope| {
        for (vcpu, steps) in arrived.iter().enumerate() {
            let machine = &machine;
            scope.spawn(move || machine.run(vcpu, steps + STEPS));
        }
    });
    let shown: Value = json!({
        "arrived": arrived,
        "now": machine.steps(),
        "right": machine.is_right(),
    });
    println!("{shown}");
    Ok(())
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["source", "--sender", socket, "--uri", uri] => source(Path::new(socket), uri),
        ["destination", "--receiver", socket] => destination(Path::new(socket)),
        _ => Err(
            "usage: toy_vm source --sender SOCKET --uri URI | toy_vm destination --receiver SOCKET"
                .into(),
        ),
    }
}
