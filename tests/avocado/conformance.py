# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance guest on every discard policy, with and without lazy attributes."""

from confidential import ConfidentialTest


class ConformanceTest(ConfidentialTest):
    """Runs the guest, and compares what QEMU says of the backend with itself and with the guest."""

    def boot(self, discard, smp, lazy):
        scenario = self.params.get("scenario", default="flip")
        self.start(
            backend=f",discard={discard},lazy-attributes={lazy}",
            smp=smp,
            append=f"scenario={scenario} timeout={self.limit} discard={discard}",
        )
        before = self.backends()["ram0"]
        self.check(before["mode"] == "private", f"the mode is {before['mode']}")
        self.check(before["discard"] == discard, f"discard is {before['discard']}, not {discard}")
        self.check(("lazy-chunk" in before) == (lazy == "on"), f"lazy-attributes={lazy}: {before}")
        self.run_guest()

        after = self.backends()["ram0"]
        self.check(after["conversions-to-private"] > 0 and after["conversions-to-shared"] > 0, f"no conversions: {after}")
        self.check(after["hypercalls"] > 0, f"no hypercalls: {after}")
        self.check(after["transition-bytes"] == 0, f"conversions are under way after the guest's end: {after}")
        totals = self.map_totals("ram0")
        for state in ("undecided", "shared", "private"):
            counted = after[f"{state}-bytes"]
            self.check(totals.get(state, 0) == counted, f"{counted} bytes are {state}, but the map says {totals}")
        self.finish()


class Conformance(ConformanceTest):
    """Every value of every property, not all of them together."""

    def test_now_1_cpu(self):
        self.boot("now", 1, "off")

    def test_coalesced_4_cpus_lazy(self):
        self.boot("coalesced", 4, "on")

    def test_keep_1_cpu_lazy(self):
        self.boot("keep", 1, "on")


class ConformanceMore(ConformanceTest):
    """
    The other combinations.

    :avocado: tags=full
    """

    def test_now_1_cpu_lazy(self):
        self.boot("now", 1, "on")

    def test_now_4_cpus(self):
        self.boot("now", 4, "off")

    def test_now_4_cpus_lazy(self):
        self.boot("now", 4, "on")

    def test_coalesced_1_cpu(self):
        self.boot("coalesced", 1, "off")

    def test_coalesced_1_cpu_lazy(self):
        self.boot("coalesced", 1, "on")

    def test_coalesced_4_cpus(self):
        self.boot("coalesced", 4, "off")

    def test_keep_1_cpu(self):
        self.boot("keep", 1, "off")

    def test_keep_4_cpus(self):
        self.boot("keep", 4, "off")

    def test_keep_4_cpus_lazy(self):
        self.boot("keep", 4, "on")
