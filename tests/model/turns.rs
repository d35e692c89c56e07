//! Chance, and what it decides: which thread goes on, and what the writer writes meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use memferry::limits::{PAGE_BYTES, PAGE_LEN};

use super::Memory;
use super::random::Random;

/// A Region as its writer has it.
#[derive(Debug)]
struct Written {
    file: File,
    bytes: u64,
    marks: File,
}

/// The sources, and the writer that changes them.
#[derive(Debug)]
pub(crate) struct World {
    memory: Vec<Written>,
    writing: bool,
}

impl World {
    pub(crate) fn new(memory: &[Memory]) -> Self {
        let written = |memory: &Memory| Written {
            bytes: memory.file.metadata().unwrap().len(),
            file: memory.file.try_clone().unwrap(),
            marks: memory.marks.try_clone().unwrap(),
        };
        Self {
            memory: memory.iter().map(written).collect(),
            writing: false,
        }
    }

    /// One write. There are few contents, so that a page often gets back what it held before.
    fn write(&self, random: &mut Random) {
        let index = usize::try_from(random.below(self.memory.len() as u64)).unwrap();
        let Written { file, bytes, marks } = &self.memory[index];
        if *bytes == 0 {
            return;
        }
        let offset = random.below(bytes.div_ceil(PAGE_BYTES)) * PAGE_BYTES;
        let length = (bytes - offset).min(PAGE_BYTES);
        let mut page = [0; PAGE_LEN];
        let content = match random.below(6) {
            0 => {
                super::punch(file, offset, length).unwrap();
                return mark(marks, offset);
            }
            1 => 0,
            2 | 3 => 0xa5,
            _ => 0x3c,
        };
        page.fill(content);
        // Some writes change a few bytes only, at the end of the page.
        let from = if random.one_in(3) { length / 2 } else { 0 };
        let written = &page[..usize::try_from(length - from).unwrap()];
        file.write_all_at(written, offset + from).unwrap();
        mark(marks, offset);
    }
}

/// Marks the page at `offset`, after it was written. Plain reading and writing will do: there is one
/// thread at a time.
fn mark(marks: &File, offset: u64) {
    let page = offset / PAGE_BYTES;
    // One bit a page, lowest first, in words of this machine's byte order.
    let mut word = [0; 8];
    let at = page / 64 * 8;
    marks.read_exact_at(&mut word, at).unwrap();
    let word = u64::from_ne_bytes(word) | 1 << (page % 64);
    marks.write_all_at(&word.to_ne_bytes(), at).unwrap();
}

#[derive(Debug)]
struct State {
    random: Random,
    world: World,
    /// Threads of this pass that have not ended.
    running: Vec<usize>,
    turn: Option<usize>,
}

/// Lets one thread of a pass run at a time.
#[derive(Debug)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

impl Turns {
    pub(crate) fn new(random: Random, world: World) -> Self {
        let state = State {
            random,
            world,
            running: Vec::new(),
            turn: None,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws something. Only for the thread whose turn it is, or between passes.
    pub(crate) fn draw<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        draw(&mut self.lock().random)
    }

    pub(crate) fn set_writing(&self, writing: bool) {
        self.lock().world.writing = writing;
    }

    /// Writes so many times, now.
    pub(crate) fn scribble(&self, writes: u32) {
        let state = &mut *self.lock();
        for _ in 0..writes {
            state.world.write(&mut state.random);
        }
    }

    /// A pass of threads 0 to `threads` begins. The draw is made before any of them runs.
    pub(crate) fn begin(&self, threads: usize) {
        let mut state = self.lock();
        state.running = (0..threads).collect();
        self.pass_on(&mut state);
    }

    /// Waits for this thread's first turn; its last one ends with what is returned.
    pub(crate) fn enter(&self, me: usize) -> Turn<'_> {
        self.wait(me, self.lock());
        Turn { turns: self, me }
    }

    /// A moment between two steps of a thread: the writer may write, and another one may go on.
    pub(crate) fn step(&self, me: usize) {
        let mut state = self.lock();
        {
            let state = &mut *state;
            while state.world.writing && state.random.one_in(3) {
                state.world.write(&mut state.random);
            }
        }
        // Outside of a pass (when streams are given up) there are no turns.
        if state.turn.is_some() {
            self.pass_on(&mut state);
            self.wait(me, state);
        }
    }

    fn pass_on(&self, state: &mut State) {
        state.turn = match state.running.len() as u64 {
            0 => None,
            running => {
                let drawn = usize::try_from(state.random.below(running)).unwrap();
                Some(state.running[drawn])
            }
        };
        self.changed.notify_all();
    }

    fn wait(&self, me: usize, mut state: MutexGuard<'_, State>) {
        while state.turn != Some(me) {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A thread's part in a pass.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    me: usize,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.running.retain(|thread| *thread != self.me);
        self.turns.pass_on(&mut state);
    }
}
