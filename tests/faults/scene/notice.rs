//! When the daemons know that something is wrong, and what it costs them until then.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use memferry::client::Event;
use serde_json::{Value, json};

use super::super::common::relay::Side;
use super::super::common::{DEADLINE, Stage, listing};
use super::super::observe::cpu;
use super::strike::JUMP;
use super::{ID, Scene, is_final};

/// A dead peer is noticed within this.
const DEAD_NOTICED: Duration = Duration::from_secs(1);

/// Added to bounds on time, for a machine that does a lot besides.
const GRACE: Duration = Duration::from_secs(1);

/// Between two looks at a receiver that announces nothing.
const LOOK: Duration = Duration::from_millis(20);

/// When in a stall its cost is measured: begin and length, well within [`STALL`].
const STALL_WINDOW: (Duration, Duration) =
    (Duration::from_millis(150), Duration::from_millis(1200));

/// Most of a CPU that a stalled daemon may take.
const STALL_CPU_MAX: f64 = 0.01;

impl Scene {
    /// What a stall costs the daemons (0 the sender, 1 the receiver). Asks them nothing meanwhile.
    pub(super) fn watch_stall(&mut self, daemons: &[usize]) {
        if !daemons.contains(&0) || self.status().is_some_and(|status| is_final(&status)) {
            // The sender does not answer, or there is nothing that could stall.
            if !daemons.contains(&1) {
                return;
            }
        }
        let pids = [self.sender.pid(), self.receiver.pid()];
        thread::sleep(STALL_WINDOW.0);
        let before: Vec<_> = daemons.iter().map(|&daemon| cpu(pids[daemon])).collect();
        let started = Instant::now();
        thread::sleep(STALL_WINDOW.1);
        let time = started.elapsed();
        for (&daemon, before) in daemons.iter().zip(before) {
            let took = cpu(pids[daemon]).saturating_sub(before);
            let share = took.as_secs_f64() / time.as_secs_f64();
            assert!(
                share <= STALL_CPU_MAX,
                "{} took {:.1} % of a CPU while nothing moved",
                ["the sender", "the receiver"][daemon],
                share * 100.0
            );
            let most = self.measured.stall_cpu.get_or_insert(0.0);
            *most = most.max(share);
        }
    }

    /// Waits until the sender knows that something is wrong, or is done.
    pub(super) fn noticed(&mut self) {
        self.watch(is_trouble);
    }

    /// Waits for a state of the transfer; asks only when the sender announces something.
    pub(super) fn watch(&mut self, wanted: impl Fn(&str) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let seen = self.sender.call("query-migrate", json!({"id": ID}));
            let status = seen["status"].as_str().unwrap();
            self.indeterminate |= status == "indeterminate";
            if wanted(status) {
                // What it announced before may still be unread.
                while self.hear(Duration::ZERO) {}
                return seen;
            }
            assert!(Instant::now() < deadline, "{seen:#}");
            self.hear(Duration::from_secs(5));
        }
    }

    /// Takes in the sender's next event; `false`: there was none.
    pub(super) fn hear(&mut self, timeout: Duration) -> bool {
        let event = self.sender.control().next_event(timeout).unwrap();
        event.inspect(|event| self.take_in(0, event)).is_some()
    }

    /// Takes in what a daemon (0 the sender, 1 the receiver) has announced.
    fn take_in(&mut self, daemon: usize, event: &Event) {
        let now = SystemTime::now();
        let mut at = UNIX_EPOCH + event.at;
        self.clock_jumped |= daemon == 0 && at > now + GRACE;
        // By a clock that did not jump.
        let year = Duration::from_secs(JUMP.unsigned_abs());
        if at > now + year / 2 {
            at -= year;
        } else if at + year / 2 < now {
            at += year;
        }
        if let Some(status) = event.data["status"].as_str() {
            self.indeterminate |= daemon == 0 && status == "indeterminate";
            self.announced[daemon].push((status.to_owned(), at));
        }
    }

    /// Waits until the receiver has ended the attempt, or has paused it.
    pub(super) fn receiver_noticed(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let query = json!({"id": ID});
            let seen = self.receiver.control().execute("query-migrate", query);
            // A receiver that was started again knows nothing of it.
            let Ok(seen) = seen else {
                return;
            };
            let status = seen["status"].as_str().unwrap();
            let heard = |(heard, _): &(String, SystemTime)| heard == status;
            if is_trouble(status) && self.announced[1].iter().any(heard) {
                return;
            }
            assert!(Instant::now() < deadline, "{seen:#}");
            while let Some(event) = self.receiver.control().next_event(LOOK).unwrap() {
                self.take_in(1, &event);
            }
        }
    }

    /// After the sender's death: the writer goes on unless somebody else may own the memory, the receiver
    /// notices, and a new sender takes up what is undecided.
    pub(super) fn bury_sender(&mut self, struck: Instant, killed: SystemTime) {
        let undecided = records(&self.stage) > 0;
        let moved = self.is_visible();
        // One that stops itself has promised to wait for the next sender's word, or is about to.
        let promised = self.stops_itself() && self.last_words() == Some("completing");
        if let Some(writer) = self.living_writer()
            && !(undecided || moved || promised)
        {
            writer.assert_runs();
            self.measured.thawed = Some(within(struck, Duration::from_secs(1)));
        }
        self.receiver_noticed();
        self.dead_noticed(Side::Sender, killed);
        if let Some(writer) = self.living_writer()
            && !promised
        {
            assert_eq!(writer.stands_still(), undecided || moved);
        }
        self.restarted[0] = true;
        // A new sender may have its answer before anybody can ask it.
        self.indeterminate |= undecided;
        self.sender = self.places.sender(&self.stage, &self.setup.faults);
        self.announced[0].clear();
    }

    /// What the dead sender announced last.
    fn last_words(&mut self) -> Option<&str> {
        while let Ok(Some(event)) = self.sender.control().next_event(Duration::ZERO) {
            self.take_in(0, &event);
        }
        let (status, _) = self.announced[0].last()?;
        Some(status)
    }

    /// That the other side has noticed in time that a process is dead. By its own account: where everything waits for
    /// a processor, the time until we hear of it is ours. Nobody can notice before a connection has ended, and until
    /// that the time is the kernel's.
    pub(super) fn dead_noticed(&mut self, dead: Side, killed: SystemTime) {
        let other = usize::from(dead == Side::Sender);
        let deadline = Instant::now() + DEADLINE;
        let noticed = loop {
            let announced = &self.announced[other];
            let (before, since) =
                announced.split_at(announced.partition_point(|(_, at)| *at < killed));
            if before.last().is_some_and(|(status, _)| is_trouble(status)) {
                // It was over, or had lost it already.
                return;
            }
            if let Some((_, at)) = since.iter().find(|(status, _)| is_trouble(status)) {
                break *at;
            }
            if other == 1 {
                // One that was started again and was never asked.
                assert!(
                    announced.is_empty(),
                    "the receiver has announced {announced:?}"
                );
                return;
            }
            // Its state is known; the word is on its way.
            assert!(
                self.hear(LOOK) || Instant::now() < deadline,
                "the sender announces nothing"
            );
        };
        let ended = self.relay.hung_up_since(dead, killed).unwrap_or(killed);
        let took = noticed.duration_since(ended).unwrap_or_default();
        assert!(
            took <= DEAD_NOTICED + GRACE,
            "noticed after {took:?}, not {DEAD_NOTICED:?}"
        );
        self.measured.dead_ended = Some(ended.duration_since(killed).unwrap_or_default());
        self.measured.dead_noticed = Some(took);
    }
}

/// Whether a daemon with such a transfer is done with it, or knows that something is wrong.
fn is_trouble(status: &str) -> bool {
    is_final(status) || ["paused", "recover", "indeterminate"].contains(&status)
}

/// The time since `struck`, which must not be above `most` by more than a busy machine explains.
pub(super) fn within(struck: Instant, most: Duration) -> Duration {
    let took = struck.elapsed();
    assert!(took <= most + GRACE, "noticed after {took:?}, not {most:?}");
    took
}

/// Records of a commit that is not decided.
fn records(stage: &Stage) -> usize {
    let names = listing(&stage.path("sender.run"));
    names.iter().filter(|name| name.ends_with(".json")).count()
}
