# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt defines, starts, queries, resets and destroys the domains of docs/libvirt."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from avocado import Test

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tests/avocado"))
import tap  # noqa: E402
from kernel import in_place  # noqa: E402

XML = CHECKOUT / "docs/libvirt"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", QEMU_NAMESPACE)

# Seconds for a command. The first one that needs QEMU has libvirtd ask it for all that it can do.
COMMAND_LIMIT = 120

# The parts of a disk that the conformance guest reads and writes, in bytes.
DISK_PART = 64 << 10


def disk_word(number):
    """`disk_word` of the conformance guest: what its disk begins with."""
    mask = (1 << 64) - 1

    def mix(value):
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    return mix(mix(7 ^ number))


class LibvirtTest(Test):
    """Runs virsh, and keeps what it says in virsh.log."""

    timeout = 600

    def setUp(self):
        self.uri = self.params.get("uri", default="qemu:///system")
        # Seconds that a guest may run.
        self.limit = int(self.params.get("limit", default=300))
        self.domain = None
        self.daemon = None
        if not shutil.which("virsh"):
            self.cancel("no virsh in PATH")
        status, text = self.run_virsh("version")
        if status:
            self.cancel(f"no libvirtd at {self.uri}: {text}")

    def tearDown(self):
        if self.domain:
            self.run_virsh("destroy", self.domain)
            self.run_virsh("undefine", self.domain)
        if self.daemon:
            self.daemon.kill()
            self.daemon.wait()

    def check(self, condition, text):
        """Fails, and says where to look, unless the condition holds."""
        if not condition:
            log = f"/var/log/libvirt/qemu/{self.domain}.log"
            if self.domain and os.path.exists(log):
                shutil.copy(log, self.logdir)
            self.fail(f"{text} (virsh.log and QEMU's log are in {self.logdir})")

    def run_command(self, *command):
        """Exit status and output."""
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_LIMIT, check=False
        )
        with open(Path(self.logdir) / "virsh.log", "a", encoding="utf-8") as log:
            print("$", *command, file=log)
            print(result.stdout, file=log)
        return result.returncode, result.stdout.strip()

    def run_virsh(self, *arguments):
        return self.run_command("virsh", "--connect", self.uri, *arguments)

    def virsh(self, *arguments):
        """The output of a command that has to succeed."""
        status, text = self.run_virsh(*arguments)
        self.check(status == 0, f"virsh {' '.join(arguments)} failed: {text}")
        return text

    def monitor(self, command, **arguments):
        """QEMU's answer to a QMP command."""
        message = json.dumps({"execute": command, "arguments": arguments})
        return json.loads(self.virsh("qemu-monitor-command", self.domain, message))["return"]


class Domains(LibvirtTest):
    """Each file from its definition to its end."""

    def test_ordinary(self):
        backends = self.live("ordinary.xml")
        self.check([b["mode"] for b in backends] == ["mapped"], f"an ordinary VM's backends: {backends}")
        # libvirt's balloon device is what the guest has given pages back with.
        self.check("actual 262144" in self.virsh("dommemstat", self.domain), "dommemstat shows another size")
        self.end()

    def test_private(self):
        (backend,) = self.live("private.xml")
        mode = "in-place" if in_place() else "private"
        self.check(backend["mode"] == mode, f"the mode is {backend['mode']}, not {mode}")
        self.check(backend["conversions-to-private"] > 0, f"nothing was converted: {backend}")
        status, text = self.run_virsh("save", self.domain, "/tmp/guestmemfd-saved")
        self.check(status != 0 and "cannot be migrated" in text, f"save of private memory: {text}")
        self.end()

    def test_numa(self):
        # With two files this guest wants empty memory, but what was shared survives a reset; in place firmware has left
        # something anywhere.
        backends = self.live("numa.xml", contents="unknown", good_again=in_place())
        self.check(sorted(b["id"] for b in backends) == ["ram0", "ram1"], f"backends: {backends}")
        self.check(all(b["private-bytes"] > 0 for b in backends), f"a backend has no private page: {backends}")
        nodes = self.virsh("qemu-monitor-command", self.domain, "--hmp", "info numa")
        self.check("node 0 size: 128 MB" in nodes and "node 1 size: 128 MB" in nodes, f"nodes: {nodes}")
        self.end()

    def test_vhost_user(self):
        image = Path(self.workdir) / "disk.img"
        words = [disk_word(number) for number in range(DISK_PART // 8)]
        image.write_bytes(struct.pack(f"<{len(words)}Q", *words).ljust(1 << 20, b"\0"))
        self.serve(image)
        (backend,) = self.live("vhost-user.xml")
        self.check(backend["mode"] == "mapped", f"the mode is {backend['mode']}")
        self.end()
        written = struct.unpack_from(f"<{len(words)}Q", image.read_bytes(), DISK_PART)
        expected = tuple(word ^ (1 << 64) - 1 for word in words)
        self.check(written == expected, "the disk is not what the guest wrote")

    def serve(self, image):
        """Starts the process that has the disk."""
        path = Path(ET.parse(XML / "vhost-user.xml").find("devices/disk/source").get("path"))
        path.unlink(missing_ok=True)
        disk = f"driver=file,node-name=disk,filename={image}"
        export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={path}"
        with open(Path(self.logdir) / "storage-daemon.log", "w", encoding="utf-8") as log:
            self.daemon = subprocess.Popen(
                ["qemu-storage-daemon", "--blockdev", disk, "--export", export], stdout=log, stderr=log
            )
        deadline = time.monotonic() + COMMAND_LIMIT
        while not path.exists():
            self.check(time.monotonic() < deadline, "qemu-storage-daemon makes no socket")
            time.sleep(0.1)
        shutil.chown(path, "libvirt-qemu")

    def live(self, file, contents="kept", good_again=True):
        """Validates, defines, starts, queries, and resets a domain; what query-guestmemfd says of its backends.

        `contents`: what the guest expects in place. `good_again`: its report is good after the reset, too.
        """
        path = str(XML / file)
        status, text = self.run_command("virt-xml-validate", path, "domain")
        self.check(status == 0, text)
        tree = ET.parse(path)
        if in_place():
            path = self.guest_that_expects(contents, tree)
        self.domain = tree.findtext("name")
        self.serial = Path(tree.find("devices/serial/source").get("path"))
        self.serial.unlink(missing_ok=True)
        self.virsh("define", path)
        self.virsh("start", self.domain)
        self.wait_report()
        self.check(self.virsh("domstate", self.domain) == "running", "the domain does not run")

        self.virsh("suspend", self.domain)
        backends = self.monitor("query-guestmemfd")
        for backend in backends:
            self.check_map(backend)
        self.virsh("resume", self.domain)

        since = len(self.serial.read_text(encoding="utf-8"))
        self.virsh("reset", self.domain)
        self.wait_report(since, good_again)
        return backends

    def guest_that_expects(self, contents, tree):
        """The domain with a word for the conformance guest: in place a page keeps its data in a conversion."""
        tree.find("os/cmdline").text += f" contents={contents}"
        path = Path(self.workdir) / "domain.xml"
        tree.write(path)
        return str(path)

    def check_map(self, backend):
        """The map says as query-guestmemfd does."""
        totals = {}
        for run in self.monitor("x-query-guestmemfd-map", id=backend["id"])["runs"]:
            totals[run["state"]] = totals.get(run["state"], 0) + run["size"]
        self.check(sum(totals.values()) == backend["size"], f"the map has not all of {backend}: {totals}")
        for state, size in totals.items():
            self.check(backend[f"{state}-bytes"] == size, f"{size} bytes {state} on the map of {backend}")

    def wait_report(self, since=0, good=True):
        """Waits for the guest's report. The guest then halts."""
        # The log is of this system's own, not on 9p, where a file that is being written can show zeros.
        deadline = time.monotonic() + self.limit
        report = ""
        while "\n1.." not in report:
            self.check(time.monotonic() < deadline, f"no report within {self.limit} s: {tap.problem(report)}")
            time.sleep(0.2)
            if self.serial.exists():
                report = self.serial.read_text(encoding="utf-8", errors="replace")[since:]
        self.check(not good or tap.problem(report) is None, tap.problem(report))

    def end(self):
        self.virsh("destroy", self.domain)
        self.check(self.virsh("domstate", self.domain) == "shut off", "the domain is not off")
        self.virsh("undefine", self.domain)


class Errors(LibvirtTest):
    """What virsh says of domains that cannot start; docs/libvirt.md has the same."""

    def refusal(self, change):
        """Tries to start private.xml after a change."""
        tree = ET.parse(XML / "private.xml")
        change(tree)
        path = Path(self.workdir) / "domain.xml"
        tree.write(path)
        self.domain = tree.findtext("name")
        status, text = self.run_virsh("create", str(path))
        self.check(status != 0, "a domain has started that should not")
        return text

    def test_start(self):
        def with_smm(tree):
            tree.find("features/smm").set("state", "on")

        def with_other_size(tree):
            tree.find("memory").text = "512"

        def with_unknown_backend(tree):
            # As a QEMU without the patches takes the right name.
            for argument in tree.iter(f"{{{QEMU_NAMESPACE}}}arg"):
                value = argument.get("value")
                argument.set("value", value.replace("memory-backend-guestmemfd", "memory-backend-unknown"))

        for change, message in (
            (with_smm, "cannot have SMM"),
            (with_other_size, "does not match"),
            (with_unknown_backend, "does not accept value 'memory-backend-unknown'"),
        ):
            text = self.refusal(change)
            self.check(message in text, f"no {message!r} in {text!r}")
