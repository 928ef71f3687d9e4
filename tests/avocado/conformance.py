# SPDX-License-Identifier: GPL-2.0-or-later
"""The conformance guest on every discard policy, with and without lazy attributes."""

from confidential import ConfidentialTest


class ConformanceTest(ConfidentialTest):
    """Runs the guest, and compares what QEMU says of the backend with itself and with the guest."""

    def boot(self, discard, smp, lazy):
        scenario = self.params.get("scenario", default="flip")
        self.start_conformance(
            append=f"scenario={scenario}",
            backend=self.choose_properties(discard, lazy),
            keeps=discard == "keep",
            smp=smp,
        )
        self.check_properties(discard, lazy)
        self.run_guest()
        self.check_conversions()
        self.finish()


class Conformance(ConformanceTest):
    """Every value of every property, not all of them together."""

    def test_now_1_cpu(self):
        self.boot("now", 1, "off")

    def test_now_4_cpus(self):
        self.boot("now", 4, "off")

    def test_now_4_cpus_lazy(self):
        self.boot("now", 4, "on")

    def test_keep_1_cpu_lazy(self):
        self.boot("keep", 1, "on")


class ConformanceMore(ConformanceTest):
    """
    The other combinations.

    :avocado: tags=full
    """

    def test_now_1_cpu_lazy(self):
        self.boot("now", 1, "on")

    def test_keep_1_cpu(self):
        self.boot("keep", 1, "off")

    def test_keep_4_cpus(self):
        self.boot("keep", 4, "off")

    def test_keep_4_cpus_lazy(self):
        self.boot("keep", 4, "on")
