// SPDX-License-Identifier: GPL-2.0-or-later
//! What state every page under test must be in, and how many conversions it took to get there. The
//! hypervisor's counters can be compared with these numbers.

use core::ops::AddAssign;

/// The view that an access or a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// The private view.
    Private,
    /// The shared view.
    Shared,
}

/// The state of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nobody has chosen yet; the guest sees the shared view.
    Undecided,
    /// In the shared view.
    Shared,
    /// In the private view.
    Private,
}

impl From<Intent> for State {
    fn from(intent: Intent) -> Self {
        match intent {
            Intent::Private => Self::Private,
            Intent::Shared => Self::Shared,
        }
    }
}

/// Events that the hypervisor counts too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests by hypercall that begin in RAM and that KVM passes on to user space.
    pub hypercalls: u64,
    /// Those of them that were answered with an error number.
    pub refused: u64,
    /// Conversions to private, by either way, that changed at least one page.
    pub to_private: u64,
    /// Conversions to shared, by either way, that changed at least one page.
    pub to_shared: u64,
    /// Pages that became private.
    pub to_private_pages: u64,
    /// Pages that became shared.
    pub to_shared_pages: u64,
    /// Memory faults with private intent.
    pub faults_private: u64,
    /// Memory faults with shared intent.
    pub faults_shared: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.hypercalls += other.hypercalls;
        self.refused += other.refused;
        self.to_private += other.to_private;
        self.to_shared += other.to_shared;
        self.to_private_pages += other.to_private_pages;
        self.to_shared_pages += other.to_shared_pages;
        self.faults_private += other.faults_private;
        self.faults_shared += other.faults_shared;
    }
}

/// Pages that have been read or written since they entered the view that they are in: those that the
/// host must have memory for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Touched {
    /// In the private view.
    pub private: u64,
    /// In the shared view.
    pub shared: u64,
}

/// The states of neighbouring pages, and the events so far.
#[derive(Debug)]
pub struct Model<'a> {
    states: &'a mut [State],
    /// What has happened so far.
    pub counts: Counts,
}

impl<'a> Model<'a> {
    /// Goes on from the states given.
    pub fn new(states: &'a mut [State]) -> Self {
        Self {
            states,
            counts: Counts::default(),
        }
    }

    /// The state of page number `page`.
    #[must_use]
    pub fn state(&self, page: usize) -> State {
        self.states[page]
    }

    /// A request by hypercall that succeeded.
    pub fn request(&mut self, first: usize, pages: usize, intent: Intent) {
        let target = State::from(intent);
        let mut changed = 0;
        for state in &mut self.states[first..first + pages] {
            changed += u64::from(*state != target);
            *state = target;
        }
        self.counts.hypercalls += 1;
        self.converted(intent, changed);
    }

    /// An access in strict mode. Returns whether it causes a memory fault, which converts that one
    /// page.
    ///
    /// A shared access to an undecided page does not: KVM cannot tell undecided from shared.
    pub fn touch(&mut self, page: usize, intent: Intent) -> bool {
        let state = &mut self.states[page];
        let faults = match intent {
            Intent::Private => *state != State::Private,
            Intent::Shared => *state == State::Private,
        };
        if faults {
            *state = State::from(intent);
            match intent {
                Intent::Private => self.counts.faults_private += 1,
                Intent::Shared => self.counts.faults_shared += 1,
            }
            self.converted(intent, 1);
        }
        faults
    }

    /// How many pages are in a state.
    #[must_use]
    pub fn pages_in(&self, state: State) -> u64 {
        self.states.iter().filter(|&&each| each == state).count() as u64
    }

    fn converted(&mut self, intent: Intent, pages: u64) {
        let conversions = u64::from(pages > 0);
        match intent {
            Intent::Private => {
                self.counts.to_private += conversions;
                self.counts.to_private_pages += pages;
            }
            Intent::Shared => {
                self.counts.to_shared += conversions;
                self.counts.to_shared_pages += pages;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_count_what_they_change() {
        let mut states = [State::Undecided; 8];
        let mut model = Model::new(&mut states);
        model.request(0, 4, Intent::Private);
        model.request(0, 4, Intent::Private);
        model.request(2, 4, Intent::Shared);
        assert_eq!(
            model.counts,
            Counts {
                hypercalls: 3,
                to_private: 1,
                to_private_pages: 4,
                to_shared: 1,
                to_shared_pages: 4,
                ..Counts::default()
            }
        );
        assert_eq!(model.pages_in(State::Private), 2);
        assert_eq!(model.pages_in(State::Shared), 4);
        assert_eq!(model.pages_in(State::Undecided), 2);
    }

    #[test]
    fn touches_fault_once() {
        let mut states = [State::Undecided; 1];
        let mut model = Model::new(&mut states);
        assert!(!model.touch(0, Intent::Shared));
        assert_eq!(model.state(0), State::Undecided);
        assert!(model.touch(0, Intent::Private));
        assert!(!model.touch(0, Intent::Private));
        assert!(model.touch(0, Intent::Shared));
        assert!(!model.touch(0, Intent::Shared));
        assert_eq!(
            (model.counts.faults_private, model.counts.faults_shared),
            (1, 1)
        );
        assert_eq!(
            (model.counts.to_private_pages, model.counts.to_shared_pages),
            (1, 1)
        );
        assert_eq!(model.counts.hypercalls, 0);
    }

    #[test]
    fn counts_add_up() {
        let one = Counts {
            hypercalls: 1,
            refused: 2,
            to_private: 3,
            to_shared: 4,
            to_private_pages: 5,
            to_shared_pages: 6,
            faults_private: 7,
            faults_shared: 8,
        };
        let mut sum = one;
        sum += one;
        assert_eq!(
            (sum.hypercalls, sum.refused, sum.to_private, sum.to_shared),
            (2, 4, 6, 8)
        );
        assert_eq!((sum.to_private_pages, sum.to_shared_pages), (10, 12));
        assert_eq!((sum.faults_private, sum.faults_shared), (14, 16));
    }
}
