// SPDX-License-Identifier: GPL-2.0-or-later
//! What QEMU calls.

use std::collections::HashSet;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use guestmemfd_guest::marks::Mark;

use crate::api::{self, ADD, Arguments, Block, Counter, Info, Instruction, NO_REGISTERS};
use crate::meter::{Counts, Meter, Touches};

const VMRUN: [u8; 3] = [0x0f, 0x01, 0xd8];
/// The longest instruction.
const MOST_BYTES: usize = 15;
/// Addresses from here on are the kernel's.
const KERNEL: u64 = 1 << 63;

/// The version of the interface that this plugin uses; QEMU looks for it.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub(crate) static qemu_plugin_version: c_int = api::VERSION;

static PLUGIN: OnceLock<Plugin> = OnceLock::new();

/// Where the counters of the three parties lie.
#[derive(Clone, Copy)]
struct Counters {
    guest: Counter,
    user: Counter,
    kernel: Counter,
}

// SAFETY: QEMU keeps the scoreboard to its end, and serves it to any thread.
unsafe impl Send for Counters {}
// SAFETY: as above.
unsafe impl Sync for Counters {}

struct Plugin {
    counters: Counters,
    state: Mutex<State>,
}

struct State {
    /// Is level 2 running?
    in_guest: bool,
    /// Where level 1's kernel goes on after it.
    behind_vmrun: HashSet<u64>,
    meter: Meter,
    touches: Touches,
    out: BufWriter<File>,
}

impl Plugin {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> Counts {
        // SAFETY: the counters exist.
        let sum = |counter| unsafe { api::qemu_plugin_u64_sum(counter) };
        Counts {
            guest: sum(self.counters.guest),
            user: sum(self.counters.user),
            kernel: sum(self.counters.kernel),
        }
    }
}

/// QEMU calls this when it has loaded the plugin.
///
/// # Safety
///
/// `words` are `count` strings.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const Info,
    count: c_int,
    words: Arguments,
) -> c_int {
    let words = (0..usize::try_from(count).unwrap_or(0)).map(|index| {
        // SAFETY: the caller answers for so many strings.
        unsafe { CStr::from_ptr(*words.add(index)) }.to_string_lossy()
    });
    let out = words.fold(None, |out, word| {
        word.strip_prefix("out=").map(str::to_owned).or(out)
    });
    let Some(out) = out else {
        eprintln!("the plugin needs a file to write to: -plugin ...,out=FILE");
        return -1;
    };
    match install(id, Path::new(&out)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("the plugin cannot write {out}: {error}");
            -1
        }
    }
}

fn install(id: u64, out: &Path) -> std::io::Result<()> {
    let out = BufWriter::new(File::create(out)?);
    // SAFETY: three numbers of 8 bytes; QEMU is there to make it.
    let scoreboard = unsafe { api::qemu_plugin_scoreboard_new(24) };
    let counter = |index: usize| Counter {
        scoreboard,
        offset: 8 * index,
    };
    let plugin = Plugin {
        counters: Counters {
            guest: counter(0),
            user: counter(1),
            kernel: counter(2),
        },
        state: Mutex::new(State {
            in_guest: false,
            behind_vmrun: HashSet::new(),
            meter: Meter::default(),
            touches: Touches::default(),
            out,
        }),
    };
    if PLUGIN.set(plugin).is_err() {
        return Err(std::io::Error::other("it is loaded already"));
    }
    // SAFETY: the callbacks live as long as QEMU, which does not unload plugins that do not ask for it.
    unsafe {
        api::qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, ptr::null_mut());
        api::qemu_plugin_register_atexit_cb(id, on_exit, ptr::null_mut());
    }
    Ok(())
}

/// A block is translated when it is first run, and level 2 does not share blocks with others: so who
/// runs now is who will always run it.
extern "C" fn on_translation(block: *mut Block, _data: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    // SAFETY: QEMU hands over a block that lives during this call; so below.
    let (start, length) = unsafe {
        (
            api::qemu_plugin_tb_vaddr(block),
            api::qemu_plugin_tb_n_insns(block),
        )
    };
    let mut state = plugin.state();
    let returns = state.behind_vmrun.contains(&start);
    let of_guest = state.in_guest && !returns;
    let counter = match of_guest {
        true => plugin.counters.guest,
        false if start >= KERNEL => plugin.counters.kernel,
        false => plugin.counters.user,
    };
    // SAFETY: as above; the callbacks live as long as QEMU.
    unsafe {
        api::qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, ADD, counter, length as u64);
        if returns {
            api::qemu_plugin_register_vcpu_tb_exec_cb(
                block,
                on_return,
                NO_REGISTERS,
                ptr::null_mut(),
            );
        }
    }
    for index in 0..length {
        // SAFETY: as above; there are so many.
        let instruction = unsafe { api::qemu_plugin_tb_get_insn(block, index) };
        look_at(instruction, of_guest, &mut state);
    }
}

/// Has QEMU tell when an instruction runs that matters.
fn look_at(instruction: *mut Instruction, of_guest: bool, state: &mut State) {
    let mut bytes = [0; MOST_BYTES];
    // SAFETY: the instruction lives as long as its block; there is room for so many bytes.
    let size =
        unsafe { api::qemu_plugin_insn_data(instruction, bytes.as_mut_ptr().cast(), bytes.len()) };
    let bytes = &bytes[..size.min(MOST_BYTES)];
    let on_execution = |callback, data| {
        // SAFETY: as above; the callbacks live as long as QEMU and take the data for a number.
        unsafe {
            api::qemu_plugin_register_vcpu_insn_exec_cb(instruction, callback, NO_REGISTERS, data);
        }
    };
    // No compiler writes such an instruction to fill a gap.
    if Mark::decode(bytes).is_some() {
        on_execution(on_mark, ptr::without_provenance_mut(bytes[3].into()));
    }
    if of_guest {
        // SAFETY: as above.
        unsafe {
            api::qemu_plugin_register_vcpu_mem_cb(
                instruction,
                on_access,
                NO_REGISTERS,
                api::READS_AND_WRITES,
                ptr::null_mut(),
            );
        }
    } else if bytes == VMRUN {
        // SAFETY: as above.
        let address = unsafe { api::qemu_plugin_insn_vaddr(instruction) };
        state.behind_vmrun.insert(address + VMRUN.len() as u64);
        on_execution(on_vmrun, ptr::null_mut());
    }
}

extern "C" fn on_vmrun(_cpu: c_uint, _data: *mut c_void) {
    if let Some(plugin) = PLUGIN.get() {
        plugin.state().in_guest = true;
    }
}

extern "C" fn on_return(_cpu: c_uint, _data: *mut c_void) {
    if let Some(plugin) = PLUGIN.get() {
        plugin.state().in_guest = false;
    }
}

extern "C" fn on_mark(_cpu: c_uint, data: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    let [a, b, c] = guestmemfd_guest::marks::PREFIX;
    let number = data.addr() as u8;
    let Some(mark) = Mark::decode(&[a, b, c, number]) else {
        return;
    };
    let now = plugin.counts();
    let mut state = plugin.state();
    if let Some(sum) = state.meter.mark(mark, now) {
        // Whoever reads the file notices that a line is missing.
        let _ = writeln!(state.out, "part={number} {sum}");
    }
}

/// In the conformance guest addresses are physical ones.
extern "C" fn on_access(_cpu: c_uint, info: u32, address: u64, _data: *mut c_void) {
    if let Some(plugin) = PLUGIN.get() {
        // SAFETY: QEMU made the number for this call.
        let write = unsafe { api::qemu_plugin_mem_is_store(info) };
        plugin.state().touches.add(address, write);
    }
}

extern "C" fn on_exit(_data: *mut c_void) {
    let Some(plugin) = PLUGIN.get() else { return };
    let all = plugin.counts();
    let mut state = plugin.state();
    let State { touches, out, .. } = &mut *state;
    // As above.
    let _ = writeln!(out, "all {all}");
    for touch in touches.order() {
        let _ = writeln!(out, "{touch}");
    }
    let _ = out.flush();
}
