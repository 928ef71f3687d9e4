// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the listener is told in a step, in an order in which a panic of its leaves nothing half
//! done: what it was told of pages is taken back when the pages are, and messages wait until they
//! have their states.

use std::thread;

use crate::error::{Error, Result};
use crate::listener::{Level, Notifier, Panics};
use crate::pages::states::View;
use crate::vm::Vm;
use crate::vm::moves::Run;

/// Runs that the listener has been told of as the host's or the guest's. Dropped before that is
/// kept, it tells the opposite.
pub(super) struct Told<'a> {
    notifier: &'a Notifier<'a>,
    runs: &'a [Run<'a>],
    /// Where they are now.
    view: View,
    /// How many of them it has been told of.
    count: usize,
}

impl<'a> Told<'a> {
    fn nothing(notifier: &'a Notifier<'a>, runs: &'a [Run<'a>], view: View) -> Self {
        let count = 0;
        Self {
            notifier,
            runs,
            view,
            count,
        }
    }

    /// Tells that runs are the host's. If one is refused, none of them is.
    pub(super) fn map(notifier: &'a Notifier<'a>, runs: &'a [Run<'a>]) -> Result<Self> {
        let mut told = Self::nothing(notifier, runs, View::Shared);
        for run in runs {
            notifier.map(run.backend, run.pages)?;
            told.count += 1;
        }
        Ok(told)
    }

    /// Tells that runs are no longer the host's.
    pub(super) fn unmap(notifier: &'a Notifier<'a>, runs: &'a [Run<'a>]) -> Self {
        let mut told = Self::nothing(notifier, runs, View::Private);
        for run in runs {
            notifier.unmap(run.backend, run.pages);
            told.count += 1;
        }
        told
    }

    /// The pages stay where they are.
    pub(super) fn keep(mut self) {
        self.count = 0;
        self.runs = &[];
    }

    /// Tells the opposite. Returns what the listener refuses, which cannot be helped.
    pub(super) fn take_back(mut self) -> Vec<Error> {
        self.tell_opposite()
    }

    fn tell_opposite(&mut self) -> Vec<Error> {
        let mut refused = Vec::new();
        let mut panics = Panics::default();
        for run in &self.runs[..std::mem::take(&mut self.count)] {
            let tell = || match self.view {
                View::Shared => {
                    self.notifier.unmap(run.backend, run.pages);
                    Ok(())
                }
                View::Private => self.notifier.map(run.backend, run.pages),
            };
            refused.extend(panics.hold(tell).and_then(Result::err));
        }
        self.owe_holes();
        refused
    }

    /// What devices have written to pages that were the host's for a moment is not kept, the page
    /// that the listener panicked at included. Mostly the caller punches it at once.
    fn owe_holes(&mut self) {
        for run in std::mem::take(&mut self.runs) {
            if self.view == View::Shared && run.backend.frees_left_view() {
                run.backend.owe_hole(run.pages, View::Shared);
            }
        }
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        // Mostly it has been kept.
        if !self.runs.is_empty() {
            self.tell_opposite();
        }
    }
}

/// Messages for when the pages of a step have their states: dropped after those, it logs them.
/// Nobody is told while a panic unwinds.
pub(super) struct Later<'a> {
    vm: &'a Vm,
    messages: Vec<(Level, Error)>,
}

impl<'a> Later<'a> {
    pub(super) fn new(vm: &'a Vm) -> Self {
        let messages = Vec::new();
        Self { vm, messages }
    }

    /// Something was lost or cannot be undone.
    pub(super) fn error(&mut self, error: Error) {
        self.messages.push((Level::Error, error));
    }

    /// Something will be tried again.
    pub(super) fn warn(&mut self, warning: Error) {
        self.messages.push((Level::Warning, warning));
    }
}

impl Drop for Later<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        for (level, error) in &self.messages {
            self.vm.log(*level, &error.to_string());
        }
    }
}
