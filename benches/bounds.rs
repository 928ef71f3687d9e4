// SPDX-License-Identifier: MIT OR Apache-2.0

//! How long a request holds others up, and how much memory it takes, if no two neighbouring pages
//! are alike: 64 GiB with an owner and files that take no time, 4 GiB with real files. And what a
//! read or write of a page takes beside the system call in it. Prints rows for `cargo xtask bench
//! bounds`. With `request`, `wait`, `rebind`, `step` or `access` as an argument it measures that
//! alone.

mod common;
#[path = "../tests/bounds/null.rs"]
mod null;
mod realtime;
mod rows;

use std::hint::black_box;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::{
    Backend, BackendConfig, Binding, FilePages, GuestPages, Listener, Mode, Owner, PAGE_SIZE,
    PageState, View, ViewFile, Vm,
};

use null::{Calls, NullOwner};
use realtime::RealTime;
use rows::row;

const GIB: u64 = (1 << 30) / PAGE_SIZE;

/// The most pages of a step: 64 MiB.
const STEP: u64 = (64 << 20) / PAGE_SIZE;

/// What others do with the machine's caches adds to times: of several rounds the least counts.
const ROUNDS: usize = 3;

/// Pages at the end that no request names, so that somebody else can convert them.
const SPARE: u64 = 4096;

/// Threads of real-time priority sleep so long between a step, or a wait, and the next: others have
/// the processors then.
const PAUSE: Duration = Duration::from_micros(200);

/// Reads or writes in a batch, and batches of which the least counts.
const ACCESSES: u32 = 500;
const BATCHES: usize = 1000;

fn main() {
    // `cargo test --benches` asks for nothing.
    if !std::env::args().any(|word| word == "--bench") {
        return;
    }
    let mut words = std::env::args().skip(1);
    let only = words.find(|word| !word.starts_with('-'));
    let wants = |part: &str| only.as_ref().is_none_or(|only| only == part);
    for machine in [Machine::null, Machine::real] {
        let machine = machine().expect("a machine");
        if wants("request") {
            machine.heap_and_interruption();
        }
        if wants("wait") {
            machine.waits();
        }
        if wants("rebind") {
            machine.rebind();
        }
    }
    if wants("step") {
        step_with_data();
    }
    if wants("access") {
        accesses();
    }
}

/// The processor's time from each look at `interrupted` to the next. Nothing is waited for between
/// two looks, so on a machine with nothing else to do it is the time.
#[derive(Default)]
struct Looks {
    last: Option<Duration>,
    /// One for each step of a request; the least of all rounds.
    steps: Vec<Duration>,
    next: usize,
    /// What the user does at each look.
    pause: Duration,
}

impl Looks {
    fn look(&mut self) {
        let now = processor_time();
        let took = self.last.map_or(Duration::ZERO, |last| now - last);
        match self.steps.get_mut(self.next) {
            Some(step) => *step = took.min(*step),
            None => self.steps.push(took),
        }
        self.next += 1;
        self.last = Some(now);
    }
}

#[derive(Clone, Default)]
struct User(Arc<Mutex<Looks>>);

impl User {
    fn looks(&self) -> MutexGuard<'_, Looks> {
        self.0.lock().expect("no panic")
    }

    /// No round has been yet. A request has at most so many steps.
    fn forget(&self, steps: usize) {
        *self.looks() = Looks::default();
        // Not in the request, whose memory is counted.
        self.looks().steps.reserve(steps);
    }

    /// Each look takes so long from now on.
    fn pause_for(&self, pause: Duration) {
        self.looks().pause = pause;
    }

    /// A round begins.
    fn begin(&self) {
        let mut looks = self.looks();
        (looks.last, looks.next) = (Some(processor_time()), 0);
    }

    /// It ends.
    fn end(&self) {
        let mut looks = self.looks();
        looks.look();
        looks.last = None;
    }

    /// The longest step, each in its quickest round.
    fn longest(&self) -> Duration {
        self.looks().steps.iter().max().copied().unwrap_or_default()
    }
}

impl Listener for User {
    fn interrupted(&self) -> bool {
        let pause = {
            let mut looks = self.looks();
            if looks.last.is_some() {
                looks.look();
            }
            looks.pause
        };
        if !pause.is_zero() {
            thread::sleep(pause);
        }
        false
    }
}

/// Remembers which page it was asked about last.
#[derive(Debug, Default)]
struct Remembering {
    owner: SoftwareOwner,
    calls: Arc<Calls>,
}

impl Owner for Remembering {
    fn check_private_memory(&self) -> guestmemfd::Result<()> {
        self.owner.check_private_memory()
    }

    fn check_mapped_memory(&self) -> guestmemfd::Result<()> {
        self.owner.check_mapped_memory()
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.owner.create_private_file(bytes)
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.owner.create_mapped_file(bytes)
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        self.calls.page.store(guest.start(), Relaxed);
        self.owner.set_attributes(guest, view)
    }
}

struct Machine {
    vm: Vm,
    backend: Arc<Backend>,
    user: User,
    calls: Arc<Calls>,
    /// What rows are called.
    name: &'static str,
    new_owner: fn(&Arc<Calls>) -> Arc<dyn Owner>,
}

impl Machine {
    fn null() -> guestmemfd::Result<Self> {
        let (name, pages) = ("64g", 64 * GIB);
        let (user, calls) = (User::default(), Arc::new(Calls::default()));
        let (vm, backend) = null::machine(pages, calls.clone(), Box::new(user.clone()))?;
        let new_owner =
            |calls: &Arc<Calls>| -> Arc<dyn Owner> { Arc::new(NullOwner(calls.clone())) };
        Ok(Self {
            vm,
            backend,
            user,
            calls,
            name,
            new_owner,
        })
    }

    fn real() -> guestmemfd::Result<Self> {
        let (name, pages) = ("4g", 4 * GIB);
        let (user, calls) = (User::default(), Arc::new(Calls::default()));
        let new_owner = |calls: &Arc<Calls>| -> Arc<dyn Owner> {
            Arc::new(Remembering {
                owner: SoftwareOwner::default(),
                calls: calls.clone(),
            })
        };
        let vm = Vm::new(new_owner(&calls), Box::new(user.clone()));
        let mut config = BackendConfig::new("ram", pages * PAGE_SIZE);
        config.mode = Some(Mode::Private);
        let backend = vm.create_backend(config)?;
        vm.add_window(&backend, guest(0, pages), 0, Binding::Bound)?;
        Ok(Self {
            vm,
            backend,
            user,
            calls,
            name,
            new_owner,
        })
    }

    /// What requests name.
    fn asked(&self) -> GuestPages {
        guest(0, self.backend.pages().end() - SPARE)
    }

    /// Makes every second page one that a request moves.
    fn prepare(&self, to: View) {
        let prepared = self.vm.convert(self.asked(), to.other());
        prepared
            .and_then(|_| null::scatter(&self.vm, self.asked(), to))
            .expect("conversions");
    }

    fn row(&self, what: &str, direction: &str, part: &str, value: u64) {
        row(
            &format!("bounds-{}-{what}", self.name),
            direction,
            part,
            value,
        );
    }

    /// Of one request for all of it.
    fn heap_and_interruption(&self) {
        for to in View::BOTH {
            let mut heap = 0;
            self.user.forget((self.asked().count() / 1024) as usize + 1);
            for _ in 0..ROUNDS {
                self.prepare(to);
                self.user.begin();
                let counted = allocation_counter::measure(|| {
                    self.vm.convert(self.asked(), to).expect("a conversion");
                });
                heap = heap.max(counted.bytes_max);
                self.user.end();
            }
            let direction = to.to_string();
            self.row("heap", &direction, "memory", heap);
            let longest = self.user.longest();
            self.row(
                "interruption",
                &direction,
                "nanoseconds",
                nanoseconds(longest),
            );
        }
    }

    /// How long others wait while a request is carried out.
    fn waits(&self) {
        let ask_about_a_moving_page = || {
            let page = self.calls.page.load(Relaxed);
            let is_moving = self.backend.state(page) == PageState::Transition;
            let before = Instant::now();
            black_box(self.vm.host_may_use(&self.backend, file(page, page + 1)));
            is_moving.then(|| before.elapsed())
        };
        self.rows_of_waits("host-may-use", ask_about_a_moving_page);
        let is_private = AtomicBool::new(false);
        let convert_another = || {
            let to = match is_private.fetch_xor(true, Relaxed) {
                true => View::Shared,
                false => View::Private,
            };
            let spare = self.backend.pages().end() - SPARE / 2;
            let before = Instant::now();
            self.vm
                .convert(guest(spare, spare + 1), to)
                .expect("a conversion");
            Some(before.elapsed())
        };
        self.rows_of_waits("another-page", convert_another);
        // What the machine adds to all of these: a thread that sleeps, how much longer than it
        // wanted to.
        let sleep = || {
            let before = Instant::now();
            thread::sleep(PAUSE);
            Some(before.elapsed().saturating_sub(PAUSE))
        };
        self.rows_of_waits("sleep", sleep);
    }

    /// Waits while one request for all of it is carried out. Who waits and who is waited for go
    /// before other programs, if they may.
    fn rows_of_waits(&self, what: &str, wait: impl Fn() -> Option<Duration> + Sync) {
        self.prepare(View::Private);
        let ended = AtomicBool::new(false);
        self.user.pause_for(PAUSE);
        let mut waits = thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let _first = RealTime::begin();
                let waits = std::iter::from_fn(|| {
                    thread::sleep(PAUSE);
                    (!ended.load(Relaxed)).then(&wait)
                });
                waits.flatten().map(nanoseconds).collect::<Vec<_>>()
            });
            let first = RealTime::begin();
            let request = self.vm.convert(self.asked(), View::Private);
            request.expect("a conversion");
            ended.store(true, Relaxed);
            if let Err(why) = first {
                println!("# other programs count: no real-time priority: {why}");
            }
            waiter.join().expect("no panic")
        });
        self.user.pause_for(Duration::ZERO);
        waits.sort_unstable();
        let Some(last) = waits.len().checked_sub(1) else {
            println!("# {what}: nobody has waited");
            return;
        };
        let longest = format!("{what}-longest");
        self.row(what, "none", "nanoseconds", waits[last * 99 / 100]);
        self.row(&longest, "none", "nanoseconds", waits[last]);
        println!(
            "# {} waits, half of them up to {} ns",
            last + 1,
            waits[last / 2]
        );
    }

    /// How long it takes until all has started over.
    fn rebind(&self) {
        let all = guest(0, self.backend.pages().end());
        let mut least = Duration::MAX;
        for _ in 0..ROUNDS {
            self.prepare(View::Private);
            self.vm.remove_window(all).expect("a window");
            let before = processor_time();
            self.vm
                .rebind((self.new_owner)(&self.calls))
                .expect("a new owner");
            least = least.min(processor_time() - before);
            let added = self.vm.add_window(&self.backend, all, 0, Binding::Bound);
            added.expect("a window");
        }
        self.row("rebind", "none", "nanoseconds", nanoseconds(least));
    }
}

/// The most that a step may be, with data to be freed in all of it: the kernel's time.
fn step_with_data() {
    let (vm, _backend) = common::backend(STEP).expect("a backend");
    let all = guest(1, STEP);
    let data = vec![7; 1 << 20];
    for gpa in (all.start_bytes()..)
        .step_by(data.len())
        .take(STEP as usize * 4096 / data.len() - 1)
    {
        vm.write(gpa, &data).expect("shared memory");
    }
    let before = processor_time();
    vm.convert(all, View::Private).expect("a conversion");
    row(
        "bounds-step-data",
        "private",
        "nanoseconds",
        nanoseconds(processor_time() - before),
    );
}

/// What a read or a write of a page takes more than the system call in it: far from private pages,
/// and with one in the same 4 MiB.
fn accesses() {
    let (vm, backend) = common::backend(GIB).expect("a backend");
    for (place, page) in [("", GIB / 2), ("-near-private", 3)] {
        let at = page * PAGE_SIZE;
        let [mut bytes, mut others] = [const { [7; PAGE_SIZE as usize] }; 2];
        vm.write(at, &bytes).expect("shared memory");
        let views = backend.views();
        let fd = views.file(View::Shared).fd();
        let whole = |count: usize| assert_eq!(count, PAGE_SIZE as usize);
        let [pread, read] = quickest([
            &mut || whole(rustix::io::pread(fd, &mut bytes, at).expect("a read")),
            &mut || vm.read(at, &mut others).expect("shared memory"),
        ]);
        let [pwrite, write] = quickest([
            &mut || whole(rustix::io::pwrite(fd, &bytes, at).expect("a write")),
            &mut || vm.write(at, &bytes).expect("shared memory"),
        ]);
        for (row, ours, system_call) in [("read", read, pread), ("write", write, pwrite)] {
            let row = format!("{row}-4k-beside-p{row}{place}");
            rows::row(
                &row,
                "none",
                "nanoseconds",
                ours.saturating_sub(system_call),
            );
        }
        println!("# pread {pread} ns, pwrite {pwrite} ns");
    }
}

/// In nanoseconds, of one call of each.
fn quickest<const N: usize>(mut acts: [&mut dyn FnMut(); N]) -> [u64; N] {
    let mut least = [Duration::MAX; N];
    for _ in 0..BATCHES {
        for (act, least) in acts.iter_mut().zip(&mut least) {
            let before = Instant::now();
            (0..ACCESSES).for_each(|_| act());
            *least = before.elapsed().min(*least);
        }
    }
    least.map(|least| nanoseconds(least) / u64::from(ACCESSES))
}

fn guest(start: u64, end: u64) -> GuestPages {
    GuestPages::new(start, end).expect("a range")
}

fn file(start: u64, end: u64) -> FilePages {
    FilePages::new(start, end).expect("a range")
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What the processor has spent on this thread.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
