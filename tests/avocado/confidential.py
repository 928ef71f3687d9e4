# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of confidential guests share: parameters, what they need of the machine, the guest's command line."""

import os
import time
from pathlib import Path

import tap
from avocado import Test
from kernel import in_place, kvm_lacks, strict_mode
from machine import Machine, MachineError

MIB = 1 << 20
SIZE = 256 * MIB

# Where strict mode shows guest memory a second time.
SHARED_BIT = 38

# What QEMU writes to shared pages: no two neighbours are equal.
PATTERN = "".join(chr(ord("A") + n * 7 % 256 % 26) for n in range(256))

# QEMU's exit status after a conformance guest that is content.
CONTENT = 33


class ConfidentialTest(Test):
    """A test of a guest whose memory is memory-backend-guestmemfd."""

    timeout = 600

    def setUp(self):
        checkout = Path(__file__).resolve().parents[2]
        self.qemu_bin = self.params.get("qemu_bin", default="qemu-system-x86_64")
        self.firmware = self.params.get("firmware", default=None)
        self.guest = self.params.get("guest", default=str(checkout / "target/guest/guestmemfd-guest"))
        # Seconds that a guest may run.
        self.limit = int(self.params.get("limit", default=300))
        self.machine = None
        lack = kvm_lacks()
        if lack:
            self.cancel(lack)

    def tearDown(self):
        if self.machine:
            self.machine.close()

    def check(self, condition, text):
        """Fails, and says where to look, unless the condition holds."""
        if not condition:
            self.fail(f"{text} (serial.log, qmp.log and qemu.log are in {self.logdir})")

    def start(self, *arguments, backend="", smp=1, size=SIZE, protection="", machine=""):
        """Starts QEMU, paused. `backend`, `protection` and `machine` are more properties of these three."""
        command = [self.qemu_bin, "-nodefaults", "-no-user-config", "-display", "none", "-S"]
        command += ["-accel", "kvm", "-cpu", "host", "-m", f"{size // MIB}M", "-smp", str(smp)]
        command += ["-object", f"memory-backend-guestmemfd,id=ram0,size={size}{backend}"]
        command += ["-object", f"sw-protected-guest,id=cgs0{protection}"]
        command += ["-machine", f"q35,memory-backend=ram0,confidential-guest-support=cgs0{machine}"]
        # After a guest's end QEMU stays, and can be asked.
        command += ["-action", "shutdown=pause"]
        if self.firmware:
            command += ["-L", self.firmware]
        try:
            self.machine = Machine(self.logdir, command + list(arguments))
        except FileNotFoundError:
            self.cancel(f"no QEMU at {self.qemu_bin}: name a patched one with -p qemu_bin=FILE")
        except MachineError as error:
            for name in ("memory-backend-guestmemfd", "sw-protected-guest"):
                if f"does not accept value '{name}'" in str(error):
                    self.cancel(f"{self.qemu_bin} lacks the patches: it knows no {name}")
            self.check(False, str(error))

    def choose_properties(self, discard, lazy):
        """The backend's properties; the test is not for a kernel that does not have them."""
        if in_place() and (discard, lazy) != ("now", "off"):
            self.cancel(f"memory is converted in place: discard={discard} with lazy-attributes={lazy} is refused")
        return f",discard={discard},lazy-attributes={lazy}"

    def start_conformance(self, *arguments, append, keeps=False, **properties):
        """
        Starts QEMU with the conformance guest; `append` is its command line. With `keeps` the backend frees
        nothing.
        """
        if not os.path.exists(self.guest):
            self.cancel(f"no guest at {self.guest}: make it with 'cargo xtask guest', or name it with -p guest=FILE")
        contents = "unknown" if keeps else "kept" if in_place() else "empty"
        append += f" timeout={self.limit} contents={contents}"
        if strict_mode():
            properties["protection"] = f",shared-bit={SHARED_BIT}"
            append += f" shared-bit={SHARED_BIT}"
        # The small guest is to have memory above 4 GiB.
        properties["machine"] = ",max-ram-below-4g=128M"
        self.start(
            "-kernel", self.guest, "-append", append,
            "-fw_cfg", f"name=opt/guestmemfd/pattern,string={PATTERN}",
            "-device", "isa-debug-exit,iobase=0x501,iosize=2",
            *arguments, **properties,
        )

    def call(self, method, *arguments, **named):
        """Calls a method of the machine; an error fails the test."""
        try:
            return getattr(self.machine, method)(*arguments, **named)
        except MachineError as error:
            return self.check(False, str(error))

    def qmp(self, command, **arguments):
        return self.call("qmp", command, **arguments)

    def backends(self):
        """What query-guestmemfd says, by id; the states of each must add up to its size."""
        backends = {backend["id"]: backend for backend in self.qmp("query-guestmemfd")}
        for name, backend in backends.items():
            states = ("undecided", "shared", "private", "transition")
            total = sum(backend[f"{state}-bytes"] for state in states)
            self.check(total == backend["size"], f"the states of {name} add up to {total} bytes: {backend}")
        return backends

    def map_totals(self, name):
        """Bytes in each state, from the runs of x-query-guestmemfd-map."""
        totals, offset = {}, 0
        while offset is not None:
            part = self.qmp("x-query-guestmemfd-map", id=name, offset=offset)
            for run in part["runs"]:
                self.check(run["offset"] == offset, f"the map of {name} has a gap at {offset:#x}: {run}")
                totals[run["state"]] = totals.get(run["state"], 0) + run["size"]
                offset += run["size"]
            offset = part.get("next")
        return totals

    def check_properties(self, discard, lazy):
        """Before the guest runs: has the backend the properties that it was to have?"""
        backend = self.backends()["ram0"]
        mode = "in-place" if in_place() else "private"
        self.check(backend["mode"] == mode, f"the mode is {backend['mode']}, not {mode}")
        self.check(backend["discard"] == discard, f"discard is {backend['discard']}, not {discard}")
        self.check(("lazy-chunk" in backend) == (lazy == "on"), f"lazy-attributes={lazy}: {backend}")

    def check_conversions(self):
        """After the guest's end: there were conversions, and the map agrees with the answer of query-guestmemfd."""
        backend = self.backends()["ram0"]
        both_ways = backend["conversions-to-private"] > 0 and backend["conversions-to-shared"] > 0
        self.check(both_ways, f"no conversions both ways: {backend}")
        self.check(backend["hypercalls"] > 0, f"no hypercalls: {backend}")
        self.check(backend["transition-bytes"] == 0, f"conversions are under way after the guest's end: {backend}")
        totals = self.map_totals("ram0")
        for state in ("undecided", "shared", "private"):
            counted = backend[f"{state}-bytes"]
            self.check(totals.get(state, 0) == counted, f"{counted} bytes are {state}, but the map says {totals}")
        return backend

    def wait_serial(self, text, since=0):
        """Waits until the guest has said this."""
        deadline = time.monotonic() + self.limit
        while text not in self.machine.serial()[since:]:
            if time.monotonic() > deadline:
                self.check(False, f"the guest did not say {text!r} within {self.limit} s; {self.guest_state(since)}")
            time.sleep(0.1)

    def guest_state(self, since=0):
        """For messages: what a guest does of which something else was expected."""
        status = self.qmp("query-status")["status"]
        cpus = self.qmp("human-monitor-command", command_line="info registers -a")
        said = self.machine.serial()[since:].splitlines()
        return f"it is {status}, its last of {len(said)} lines is {said[-1:]}, its CPUs:\n{cpus}\n"

    def run_guest(self, resets=0):
        """Lets the guest run to its end, and checks what it says. It or SeaBIOS may reset the machine so many times."""
        since = len(self.machine.serial())
        self.qmp("cont")
        for _ in range(resets + 1):
            event = self.call("event", "SHUTDOWN", "STOP", "RESET", limit=self.limit)
            if event["event"] != "RESET":
                break
        reason = event.get("data", {}).get("reason")
        self.check(reason == "guest-shutdown", f"the guest did not end itself: {event['event']}, {reason}")
        self.call("event", "STOP", limit=self.limit)
        report = self.machine.serial()[since:]
        self.check(tap.problem(report) is None, tap.problem(report))

    def finish(self, expected=CONTENT):
        """Ends QEMU, whose exit status tells whether the guest was content."""
        status = self.call("quit")
        self.check(status == expected, f"QEMU ended with status {status}, not {expected}")
