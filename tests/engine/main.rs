// SPDX-License-Identifier: MIT OR Apache-2.0

//! Conversions and discards against a plain model, with every system call and callback failing in
//! turn, alone or with all that follow. The files are real memfds; only the hypervisor is the
//! software owner.
//!
//! `machine`, `mapper`, `fault` and `request` are what the tests are made of; the other modules are
//! the tests, by subject.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod access;
mod callbacks;
mod discards;
mod failures;
mod fault;
mod guest_memory;
mod in_place;
mod layout;
mod lazy_attributes;
mod machine;
mod mapper;
mod observing;
mod request;
mod restore;
mod threads;
mod wrong_backend;
