# SPDX-License-Identifier: GPL-2.0-or-later
"""Backends that come and go while QEMU runs, and the errors of those that cannot."""

from confidential import MIB, SIZE, ConfidentialTest

BACKEND = "memory-backend-guestmemfd"

# Registers of ACPI memory hotplug on q35: which slot, and what to do with it. The guest's ACPI code
# would write them; the conformance guest has none, so the monitor does.
SLOT = 0xA00
CONTROL = 0xA14
EJECT = 1 << 3


class Hotplug(ConfidentialTest):
    """A second backend beside the guest's memory."""

    def test_object_add_and_del(self):
        self.start()
        for _ in range(3):
            self.qmp("object-add", qom_type=BACKEND, id="extra", size=16 * MIB)
            backends = self.backends()
            self.check(set(backends) == {"ram0", "extra"}, f"backends: {set(backends)}")
            self.check(backends["extra"]["size"] == 16 * MIB, f"{backends['extra']}")
            self.qmp("object-del", id="extra")
            self.check(set(self.backends()) == {"ram0"}, "a deleted backend is still listed")
        self.finish(expected=0)

    def test_dimm(self):
        self.start_conformance("-m", f"{SIZE // MIB}M,slots=2,maxmem=4G", append="scenario=flip")
        self.qmp("object-add", qom_type=BACKEND, id="extra", size=128 * MIB)
        self.qmp("device_add", driver="pc-dimm", id="dimm0", memdev="extra")
        devices = self.qmp("query-memory-devices")
        self.check([d["data"]["memdev"] for d in devices] == ["/objects/extra"], f"memory devices: {devices}")
        self.run_guest()
        self.check(set(self.backends()) == {"ram0", "extra"}, f"backends: {set(self.backends())}")
        why = self.call("refusal", "object-del", id="extra")
        self.check("mapped" in why, f"object-del of a backend in use: {why}")

        self.qmp("device_del", id="dimm0")
        for size, register, value in (("w", SLOT, 0), ("b", CONTROL, EJECT)):
            self.qmp("human-monitor-command", command_line=f"o/{size} {register:#x} {value:#x}")
        self.call("event", "DEVICE_DELETED", limit=self.limit)
        self.check(self.qmp("query-memory-devices") == [], "the DIMM is still there")
        self.qmp("object-del", id="extra")
        self.check(set(self.backends()) == {"ram0"}, "the DIMM's backend is still listed")
        self.finish()


class Refusals(ConfidentialTest):
    """Errors that say what is wrong."""

    def test_object_add(self):
        self.start()
        for properties, word in (
            ({"size": 0}, "size"),
            ({"size": 1000000}, "multiple of"),
            ({"size": MIB, "share": False}, "share=off is not possible"),
            ({"size": MIB, "discard": "never"}, "never"),
            ({"size": MIB, "mode": "mapped"}, "the guest is confidential"),
            ({"size": MIB, "lazy_chunk": 2048}, "power of two"),
        ):
            why = self.call("refusal", "object-add", qom_type=BACKEND, id="extra", **properties)
            self.check(word in why, f"{properties}: no {word!r} in {why!r}")
        self.check(set(self.backends()) == {"ram0"}, "a refused backend is listed")
        self.finish(expected=0)

    def test_queries(self):
        self.start()
        for arguments, word in (
            ({"id": "ram1"}, "ram1"),
            ({"id": "ram0", "max_runs": 0}, "between 1 and 65536"),
            ({"id": "ram0", "offset": SIZE}, "empty"),
            ({"id": "ram0", "offset": SIZE - MIB, "size": 2 * MIB}, "outside"),
            ({"id": "ram0", "offset": 100}, "aligned"),
        ):
            why = self.call("refusal", "x-query-guestmemfd-map", **arguments)
            self.check(word in why, f"{arguments}: no {word!r} in {why!r}")
        self.finish(expected=0)
