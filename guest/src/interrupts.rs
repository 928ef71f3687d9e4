// SPDX-License-Identifier: GPL-2.0-or-later
//! Descriptor tables, and what happens on an exception: the guest says where and why, and ends.

use crate::cpu::{self, FIRST_TSS, MAX_CPUS};
use crate::{pic, serial, tap};
use core::arch::asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

/// The vector of the local APIC's timer.
pub(crate) const TIMER_VECTOR: u8 = 0x20;

/// How often each of the legacy interrupts has come, see [`pic::VECTORS`].
static COUNTS: [AtomicU64; pic::VECTORS.len()] = [const { AtomicU64::new(0) }; 2];

const CODE: u16 = 0x18;
const EXCEPTIONS: usize = 32;
const EXCEPTION_STACK: u8 = 1;
const TIMER_STACK: u8 = 2;
const NON_MASKABLE: usize = 2;
const PAGE_FAULT: u64 = 14;
/// A non-maskable interrupt can strike in the handler of another exception.
const NON_MASKABLE_STACK: u8 = 3;
const INTERRUPT_STACK_SIZE: usize = 8 << 10;

#[cfg(panic = "abort")]
core::arch::global_asm!(
    include_str!("interrupts.s"),
    exception = sym exception,
    timer = sym crate::apic::timer,
    counts = sym COUNTS,
    options(att_syntax)
);

unsafe extern "C" {
    fn exception_entries();
    fn timer_entry();
    fn counted_entries();
    fn ignore_entry();
}

/// The 64-bit task state segment. Its 64-bit fields are not aligned.
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
struct TaskState {
    reserved: u32,
    stacks: [u64; 3],
    reserved_2: u64,
    interrupt_stacks: [u64; 7],
    reserved_3: u64,
    reserved_4: u16,
    /// For programs outside of ring 0, of which there are none.
    io_map: u16,
}

#[repr(C, align(16))]
struct Tables {
    /// Null, two unused, 64-bit code; then a task state descriptor of 16 bytes for every CPU.
    descriptors: [u64; 4 + 2 * MAX_CPUS],
    tasks: [TaskState; MAX_CPUS],
    gates: [[u64; 2]; 256],
    interrupt_stacks: [[[u8; INTERRUPT_STACK_SIZE]; 3]; MAX_CPUS],
}

struct Shared(UnsafeCell<Tables>);

// SAFETY: the boot CPU writes it before other CPUs start; every CPU then changes the entries of its
// own number only.
unsafe impl Sync for Shared {}

static TABLES: Shared = Shared(UnsafeCell::new(Tables {
    descriptors: [0; 4 + 2 * MAX_CPUS],
    tasks: [TaskState {
        reserved: 0,
        stacks: [0; 3],
        reserved_2: 0,
        interrupt_stacks: [0; 7],
        reserved_3: 0,
        reserved_4: 0,
        io_map: 0,
    }; MAX_CPUS],
    gates: [[0; 2]; 256],
    interrupt_stacks: [[[0; INTERRUPT_STACK_SIZE]; 3]; MAX_CPUS],
}));

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

impl TablePointer {
    fn to<T>(table: *const T) -> Self {
        Self {
            limit: (size_of::<T>() - 1) as u16,
            base: table as u64,
        }
    }
}

/// Loads the tables. Every CPU calls it, the boot CPU (number 0) before it starts the others.
pub(crate) fn init(cpu: usize) {
    assert!(cpu < MAX_CPUS);
    let tables = TABLES.0.get();
    // SAFETY: see the Sync implementation.
    unsafe {
        if cpu == 0 {
            fill_gates(&mut (*tables).gates);
            (*tables).descriptors[usize::from(CODE / 8)] = 0x00af_9a00_0000_ffff;
        }
        let stacks = (&raw const (*tables).interrupt_stacks[cpu]) as u64;
        let task = &raw mut (*tables).tasks[cpu];
        let stack_ends = [1, 2, 3].map(|stack| stacks + stack * INTERRUPT_STACK_SIZE as u64);
        (&raw mut (*task).interrupt_stacks)
            .cast::<[u64; 3]>()
            .write_unaligned(stack_ends);

        let at = task as u64;
        let low = (size_of::<TaskState>() as u64 - 1)
            | (at & 0xff_ffff) << 16
            | 0x89 << 40
            | (at >> 24 & 0xff) << 56;
        let selector = FIRST_TSS + 16 * cpu as u16;
        let descriptor = usize::from(selector / 8);
        (&raw mut (*tables).descriptors[descriptor]).write(low);
        (&raw mut (*tables).descriptors[descriptor + 1]).write(at >> 32);

        let descriptors = TablePointer::to(&raw const (*tables).descriptors);
        let gates = TablePointer::to(&raw const (*tables).gates);
        load(&descriptors, &gates, selector);
    }
}

/// # Safety
///
/// The tables must be valid and stay.
unsafe fn load(descriptors: &TablePointer, gates: &TablePointer, task: u16) {
    // SAFETY: the code segment is the one that is in use, now in a table of our own; 64-bit code
    // needs no data segments.
    unsafe {
        asm!(
            "lgdt [{descriptors}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "xor {scratch:e}, {scratch:e}",
            "mov ds, {scratch:x}",
            "mov es, {scratch:x}",
            "mov ss, {scratch:x}",
            "lidt [{gates}]",
            "ltr {task:x}",
            descriptors = in(reg) descriptors,
            gates = in(reg) gates,
            task = in(reg) task,
            code = const CODE,
            scratch = out(reg) _,
        );
    }
}

fn fill_gates(gates: &mut [[u64; 2]; 256]) {
    let entries = exception_entries as *const () as u64;
    for (vector, slot) in gates.iter_mut().enumerate() {
        *slot = match vector {
            NON_MASKABLE => gate(entries + 16 * vector as u64, NON_MASKABLE_STACK),
            0..EXCEPTIONS => gate(entries + 16 * vector as u64, EXCEPTION_STACK),
            _ => gate(ignore_entry as *const () as u64, TIMER_STACK),
        };
    }
    let entries = counted_entries as *const () as u64;
    for (index, vector) in pic::VECTORS.into_iter().enumerate() {
        gates[usize::from(vector)] = gate(entries + 32 * index as u64, TIMER_STACK);
    }
    gates[usize::from(TIMER_VECTOR)] = gate(timer_entry as *const () as u64, TIMER_STACK);
}

/// How often each of the legacy interrupts has come.
pub(crate) fn counted() -> [u64; pic::VECTORS.len()] {
    COUNTS.each_ref().map(|count| count.load(Ordering::Relaxed))
}

/// An interrupt gate: interrupts stay off in the handler.
fn gate(handler: u64, stack: u8) -> [u64; 2] {
    let low = (handler & 0xffff)
        | u64::from(CODE) << 16
        | u64::from(stack) << 32
        | 0x8e << 40
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// What `interrupts.s` and the CPU have pushed, lowest address first.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Frame {
    /// r15 to r8, then rbp, rdi, rsi, rdx, rcx, rbx, rax.
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 15] = [
            "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rbp", "rdi", "rsi", "rdx",
            "rcx", "rbx", "rax",
        ];
        write!(
            f,
            "rip={:#x} rsp={:#x} rflags={:#x}",
            self.rip, self.rsp, self.rflags
        )?;
        for (name, value) in NAMES.iter().zip(self.registers).rev() {
            write!(f, " {name}={value:#x}")?;
        }
        Ok(())
    }
}

fn exception_name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE divide error",
        2 => "non-maskable interrupt",
        3 => "#BP breakpoint",
        6 => "#UD invalid opcode",
        8 => "#DF double fault",
        12 => "#SS stack fault",
        13 => "#GP general protection fault",
        PAGE_FAULT => "#PF page fault",
        18 => "#MC machine check",
        _ => "exception",
    }
}

/// Where all exceptions end.
extern "C" fn exception(frame: &Frame) -> ! {
    serial::urgent_line(format_args!("# cpu{}: {frame}", cpu::index()));
    let name = exception_name(frame.vector);
    if frame.vector == PAGE_FAULT {
        tap::bail_out(format_args!(
            "{name} at {:#x}, error code {:#x}, address {:#x}",
            frame.rip,
            frame.error,
            cpu::fault_address()
        ));
    }
    tap::bail_out(format_args!(
        "{name} (vector {}) at {:#x}, error code {:#x}",
        frame.vector, frame.rip, frame.error
    ))
}
