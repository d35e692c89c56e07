//! Which pages are written in every pass. Sent each time, they are sent in vain each time: where passes do not
//! get shorter they are left for a later one, and for the last.

use crate::pages::PageSet;

/// What was owed when a pass was planned.
#[derive(Debug, Default)]
pub(super) struct Habits {
    before: Vec<PageSet>,
}

/// Of what is owed, at least one part in so many is sent, or all of it: passes that send next to nothing would
/// use up max-iterations while the writer has not had time to change its habits. Of 4, 8, 16 and 1000 it is, in
/// a simulation of 24 writers, the one that saves most and makes none stand still for longer.
const SENT_MIN: u64 = 8;

impl Habits {
    /// What the next pass is to send of what is `owed`, by Region, and how many pages it leaves: those that the
    /// pass before sent or left, too, if they are to be left at all.
    pub(super) fn worth_sending(&mut self, owed: Vec<PageSet>, leave: bool) -> (Vec<PageSet>, u64) {
        let before = std::mem::replace(&mut self.before, owed.clone());
        // The first time nothing is known.
        if !leave || before.len() != owed.len() {
            return (owed, 0);
        }
        let count = |sets: &[PageSet]| sets.iter().map(PageSet::count).sum::<u64>();
        let mut seldom = owed.clone();
        for (seldom, before) in seldom.iter_mut().zip(&before) {
            seldom.subtract(before);
        }
        let (all, worth) = (count(&owed), count(&seldom));
        if worth < all.div_ceil(SENT_MIN) {
            return (owed, 0);
        }
        (seldom, all - worth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PageRange;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(100);
        for &first in pages {
            set.insert(PageRange { first, count: 1 });
        }
        set
    }

    fn pages(sets: &[PageSet]) -> Vec<Vec<u64>> {
        let list = |set: &PageSet| (0..100).filter(|page| set.contains(*page)).collect();
        sets.iter().map(list).collect()
    }

    #[test]
    fn pages_of_the_pass_before_are_left_if_enough_others_are_owed() {
        let mut habits = Habits::default();
        let (first, left) = habits.worth_sending(vec![set(&[1, 2]), set(&[7])], true);
        assert_eq!((pages(&first), left), (vec![vec![1, 2], vec![7]], 0));
        let (next, left) = habits.worth_sending(vec![set(&[1, 5]), set(&[7])], true);
        assert_eq!((pages(&next), left), (vec![vec![5], vec![]], 2));
        // What was left counts as owed before, and here all of it was.
        let (next, left) = habits.worth_sending(vec![set(&[1]), set(&[7])], true);
        assert_eq!((pages(&next), left), (vec![vec![1], vec![7]], 0));
        // One of nine is too little.
        let _ = habits.worth_sending(vec![set(&[1, 2, 3, 4, 5, 6, 7, 8]), set(&[])], true);
        let (next, left) =
            habits.worth_sending(vec![set(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), set(&[])], true);
        assert_eq!((pages(&next)[0].len(), left), (9, 0));
    }

    #[test]
    fn nothing_is_left_unless_asked() {
        let mut habits = Habits::default();
        for _ in 0..3 {
            let (sent, left) = habits.worth_sending(vec![set(&[1, 2])], false);
            assert_eq!((pages(&sent), left), (vec![vec![1, 2]], 0));
        }
        // It was paid attention all the time.
        let (sent, left) = habits.worth_sending(vec![set(&[2, 3])], true);
        assert_eq!((pages(&sent), left), (vec![vec![3]], 1));
    }
}
