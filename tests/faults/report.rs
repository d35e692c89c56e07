//! What is printed at the end.

use std::time::{Duration, Instant};

use super::longest;
use super::matrix::{Cell, FAULTS, Outcome, PHASES};
use super::scene::Measured;

/// What came of a cell.
#[derive(Debug, Clone)]
pub(crate) enum Verdict {
    /// One of the outcomes it may have.
    As(Outcome, Measured),
    Wrong(String),
    /// It needs root, and namespaces.
    Skipped,
}

pub(crate) struct Report {
    started: Instant,
    cells: Vec<(Cell, Verdict)>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            cells: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, cell: Cell, verdict: Verdict) {
        if let Verdict::Wrong(problem) = &verdict {
            eprintln!("WRONG {cell}: {problem}");
        }
        self.cells.push((cell, verdict));
    }

    pub(crate) fn is_good(&self) -> bool {
        let wrong = |(_, verdict): &(Cell, Verdict)| matches!(verdict, Verdict::Wrong(_));
        !self.cells.iter().any(wrong)
    }

    /// The matrix, a letter per outcome with the number of cells that ended so; then the sums.
    pub(crate) fn print(&self) {
        print!("{:20}", "");
        for (_, phase) in PHASES {
            print!("{phase:>10}");
        }
        println!();
        for &(fault, name) in FAULTS {
            if !self.cells.iter().any(|(cell, _)| cell.fault == fault) {
                continue;
            }
            print!("{name:20}");
            for &(phase, _) in PHASES {
                let here = self
                    .cells
                    .iter()
                    .filter(|(cell, _)| cell.fault == fault && cell.phase == phase);
                print!("{:>10}", letters(here.map(|(_, verdict)| verdict)));
            }
            println!();
        }
        println!(
            "= identical, x failed with the source running, s resolved for the source, d resolved for the destination, - skipped, ! wrong"
        );
        let verdicts = self.cells.iter().map(|(_, verdict)| verdict);
        println!(
            "{} cells in {:.0} s: {}",
            self.cells.len(),
            self.started.elapsed().as_secs_f32(),
            letters(verdicts)
        );
        self.print_measured();
        for (cell, verdict) in &self.cells {
            if let Verdict::Wrong(problem) = verdict {
                println!("WRONG {cell}: {problem}");
                println!("      cargo test --test faults -- --cell {cell}");
            }
        }
    }

    fn print_measured(&self) {
        let mut most = Measured::default();
        for (_, verdict) in &self.cells {
            if let Verdict::As(_, measured) = verdict {
                most.dead_noticed = longest(most.dead_noticed, measured.dead_noticed);
                most.hang_noticed = longest(most.hang_noticed, measured.hang_noticed);
                most.thawed = longest(most.thawed, measured.thawed);
                if measured.stall_cpu > most.stall_cpu {
                    most.stall_cpu = measured.stall_cpu;
                }
                most.torn += measured.torn;
            }
        }
        let ms = |time: Option<Duration>| {
            time.map_or("-".to_owned(), |t| format!("{} ms", t.as_millis()))
        };
        println!(
            "at most: a dead peer noticed after {}, a hang or a partition after {}, a writer of a dead sender running after {}, CPU while stalled {:.2} %",
            ms(most.dead_noticed),
            ms(most.hang_noticed),
            ms(most.thawed),
            most.stall_cpu.unwrap_or(0.0) * 100.0
        );
    }
}

/// How many of each outcome.
fn letters<'a>(verdicts: impl Iterator<Item = &'a Verdict>) -> String {
    let kinds = ['=', 'x', 's', 'd', '-', '!'];
    let mut counts = [0; 6];
    for verdict in verdicts {
        let kind = match verdict {
            Verdict::As(Outcome::Identical, _) => 0,
            Verdict::As(Outcome::Failed, _) => 1,
            Verdict::As(Outcome::ResolvedSource, _) => 2,
            Verdict::As(Outcome::ResolvedDestination, _) => 3,
            Verdict::Skipped => 4,
            Verdict::Wrong(_) => 5,
        };
        counts[kind] += 1;
    }
    let counts = counts.iter().zip(kinds);
    counts
        .filter(|(count, _)| **count > 0)
        .map(|(count, kind)| format!("{count}{kind}"))
        .collect::<Vec<_>>()
        .join(" ")
}
