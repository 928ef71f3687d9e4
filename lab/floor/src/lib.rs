// SPDX-License-Identifier: GPL-2.0-or-later
//! Starting the conformance guest without firmware, for VMMs that have next to nothing.

pub mod boot;
