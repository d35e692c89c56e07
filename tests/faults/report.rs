//! What is printed at the end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Case;
use super::matrix::{Cell, FAULTS, Outcome, PHASES, name_of};
use super::scene::Measured;
use super::soak::Run;

/// What came of a case.
#[derive(Debug, Clone)]
pub(crate) enum Verdict {
    /// A cell, and one of the outcomes it may have.
    As(Outcome, Measured),
    /// A run of the soak, in which nothing was lost.
    Ran(Run),
    Wrong(String),
    /// It needs root, and namespaces.
    Skipped,
}

impl Verdict {
    fn measured(&self) -> Option<&Measured> {
        match self {
            Self::As(_, measured) => Some(measured),
            Self::Ran(run) => Some(&run.measured),
            Self::Wrong(_) | Self::Skipped => None,
        }
    }
}

/// How often a soak says how far it is.
const PROGRESS: Duration = Duration::from_secs(60);

pub(crate) struct Report {
    started: Instant,
    told: Instant,
    cases: Vec<(Case, Verdict)>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            told: Instant::now(),
            cases: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, case: Case, verdict: Verdict) {
        if let Verdict::Wrong(problem) = &verdict {
            eprintln!("WRONG {case}: {problem}");
        }
        self.cases.push((case, verdict));
        if self.told.elapsed() > PROGRESS {
            self.told = Instant::now();
            self.print_sum();
        }
    }

    pub(crate) fn is_good(&self) -> bool {
        let wrong = |(_, verdict): &(Case, Verdict)| matches!(verdict, Verdict::Wrong(_));
        !self.cases.iter().any(wrong)
    }

    pub(crate) fn print(&self) {
        if self.cells().next().is_some() {
            self.print_matrix();
        }
        self.print_struck();
        let seeds = self.cases.iter().filter_map(|(case, _)| match case {
            Case::Random(seed) => Some(*seed),
            Case::Cell(_) => None,
        });
        if let (Some(first), Some(last)) = (seeds.clone().min(), seeds.max()) {
            println!("seeds {first} to {last}");
        }
        println!(
            "= identical, x failed with the source running, s resolved for the source, d resolved for the destination, - skipped, ! wrong"
        );
        self.print_sum();
        self.print_measured();
        for (case, verdict) in &self.cases {
            if let Verdict::Wrong(problem) = verdict {
                println!("WRONG {case}: {problem}");
                println!("      cargo test --test faults -- --cell {case}");
            }
        }
    }

    fn cells(&self) -> impl Iterator<Item = (Cell, &Verdict)> {
        self.cases.iter().filter_map(|(case, verdict)| match case {
            Case::Cell(cell) => Some((*cell, verdict)),
            Case::Random(_) => None,
        })
    }

    /// A letter per outcome, with the number of cells that ended so.
    fn print_matrix(&self) {
        print!("{:20}", "");
        for (_, phase) in PHASES {
            print!("{phase:>10}");
        }
        println!();
        for &(fault, name) in FAULTS {
            if !self.cells().any(|(cell, _)| cell.fault == fault) {
                continue;
            }
            print!("{name:20}");
            for &(phase, _) in PHASES {
                let here = self.cells();
                let here = here.filter(|(cell, _)| cell.fault == fault && cell.phase == phase);
                print!("{:>10}", letters(here.map(|(_, verdict)| verdict)));
            }
            println!();
        }
    }

    /// What a soak did, how often, and how the runs ended in which it was done.
    fn print_struck(&self) {
        let mut struck: BTreeMap<&str, Vec<&Verdict>> = BTreeMap::new();
        for (_, verdict) in &self.cases {
            if let Verdict::Ran(run) = verdict {
                for &fault in &run.struck {
                    struck
                        .entry(name_of(FAULTS, fault))
                        .or_default()
                        .push(verdict);
                }
            }
        }
        for (name, verdicts) in &struck {
            println!(
                "{name:20}{:6}   {}",
                verdicts.len(),
                letters(verdicts.iter().copied())
            );
        }
        if !struck.is_empty() {
            println!("{} faults", struck.values().map(Vec::len).sum::<usize>());
        }
    }

    fn print_sum(&self) {
        println!(
            "{} transfers in {:.0} s: {}",
            self.cases.len(),
            self.started.elapsed().as_secs_f32(),
            letters(self.cases.iter().map(|(_, verdict)| verdict))
        );
    }

    fn print_measured(&self) {
        let measured = || {
            self.cases
                .iter()
                .filter_map(|(_, verdict)| verdict.measured())
        };
        let most = |time: fn(&Measured) -> Option<Duration>| {
            let most = measured().filter_map(time).max();
            most.map_or_else(|| "-".to_owned(), |time| format!("{} ms", time.as_millis()))
        };
        let cpu = measured().filter_map(|measured| measured.stall_cpu);
        println!(
            "at most: the connections of a dead peer ended after {}, noticed {} later, a hang or a partition after {}, the writer of a dead sender running after {}; CPU while stalled {:.2} %",
            most(|measured| measured.dead_ended),
            most(|measured| measured.dead_noticed),
            most(|measured| measured.hang_noticed),
            most(|measured| measured.thawed),
            cpu.fold(0.0, f64::max) * 100.0
        );
        let torn: u64 = measured().map(|measured| measured.torn).sum();
        let mut codes: BTreeMap<&str, usize> = BTreeMap::new();
        for code in measured().filter_map(|measured| measured.code.as_deref()) {
            *codes.entry(code).or_default() += 1;
        }
        println!("torn pages sent again: {torn}; failed with: {codes:?}");
    }
}

/// How many of each outcome.
fn letters<'a>(verdicts: impl Iterator<Item = &'a Verdict>) -> String {
    let kinds = ['=', 'x', 's', 'd', '-', '!'];
    let mut counts = [0; 6];
    for verdict in verdicts {
        let kind = match verdict {
            Verdict::As(outcome, _) | Verdict::Ran(Run { outcome, .. }) => match outcome {
                Outcome::Identical => 0,
                Outcome::Failed => 1,
                Outcome::ResolvedSource => 2,
                Outcome::ResolvedDestination => 3,
            },
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
