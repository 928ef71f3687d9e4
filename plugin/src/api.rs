// SPDX-License-Identifier: GPL-2.0-or-later
//! The part of `qemu-plugin.h` that is needed, at version 7 of the interface (QEMU 11.1). The crate
//! `qemu-plugin` ends at version 5, and from 7 on callbacks take other arguments.

use std::ffi::{c_char, c_int, c_uint, c_void};

pub(crate) const VERSION: c_int = 7;
/// Callbacks that look at no registers.
pub(crate) const NO_REGISTERS: c_int = 0;
/// `QEMU_PLUGIN_MEM_RW`.
pub(crate) const READS_AND_WRITES: c_int = 3;
/// `QEMU_PLUGIN_INLINE_ADD_U64`.
pub(crate) const ADD: c_int = 0;

/// A block of instructions that is being translated.
#[repr(C)]
pub(crate) struct Block {
    _opaque: [u8; 0],
}

/// An instruction of it.
#[repr(C)]
pub(crate) struct Instruction {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct Scoreboard {
    _opaque: [u8; 0],
}

/// A number that each virtual CPU has.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Counter {
    pub(crate) scoreboard: *mut Scoreboard,
    pub(crate) offset: usize,
}

pub(crate) type OnTranslation = extern "C" fn(block: *mut Block, data: *mut c_void);
pub(crate) type OnExecution = extern "C" fn(cpu: c_uint, data: *mut c_void);
pub(crate) type OnAccess = extern "C" fn(cpu: c_uint, info: u32, address: u64, data: *mut c_void);
pub(crate) type OnExit = extern "C" fn(data: *mut c_void);

/// `qemu_info_t`, which is not looked at.
#[repr(C)]
pub(crate) struct Info {
    _opaque: [u8; 0],
}

pub(crate) type Arguments = *const *const c_char;

unsafe extern "C" {
    pub(crate) fn qemu_plugin_register_vcpu_tb_trans_cb(
        id: u64,
        callback: OnTranslation,
        data: *mut c_void,
    );
    pub(crate) fn qemu_plugin_register_atexit_cb(id: u64, callback: OnExit, data: *mut c_void);
    pub(crate) fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut Block,
        callback: OnExecution,
        flags: c_int,
        data: *mut c_void,
    );
    pub(crate) fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        block: *mut Block,
        operation: c_int,
        counter: Counter,
        value: u64,
    );
    pub(crate) fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        callback: OnExecution,
        flags: c_int,
        data: *mut c_void,
    );
    pub(crate) fn qemu_plugin_register_vcpu_mem_cb(
        instruction: *mut Instruction,
        callback: OnAccess,
        flags: c_int,
        accesses: c_int,
        data: *mut c_void,
    );
    pub(crate) fn qemu_plugin_tb_n_insns(block: *const Block) -> usize;
    pub(crate) fn qemu_plugin_tb_vaddr(block: *const Block) -> u64;
    pub(crate) fn qemu_plugin_tb_get_insn(block: *const Block, index: usize) -> *mut Instruction;
    pub(crate) fn qemu_plugin_insn_vaddr(instruction: *const Instruction) -> u64;
    pub(crate) fn qemu_plugin_insn_data(
        instruction: *const Instruction,
        to: *mut c_void,
        size: usize,
    ) -> usize;
    pub(crate) fn qemu_plugin_mem_is_store(info: u32) -> bool;
    pub(crate) fn qemu_plugin_scoreboard_new(size: usize) -> *mut Scoreboard;
    pub(crate) fn qemu_plugin_u64_sum(counter: Counter) -> u64;
}
