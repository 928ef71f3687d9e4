# SPDX-License-Identifier: GPL-2.0-or-later
"""Resets, the guest's end and QEMU's."""

from confidential import SIZE, ConfidentialTest


class Lifecycle(ConfidentialTest):
    """One guest through its life."""

    def test_reset_and_shutdown(self):
        # This scenario looks for what it has left in private pages when it ran before.
        self.start_conformance(append="scenario=reset")
        self.run_guest()
        self.check(self.backends()["ram0"]["private-bytes"] > 0, "the guest has left no private pages")

        self.reset()
        # Out of a run: SeaBIOS finds that it ran before, and resets the machine once.
        since = len(self.machine.serial())
        self.qmp("cont")
        self.call("event", "RESET", limit=self.limit)
        self.wait_serial("TAP version", since=since)
        self.qmp("stop")
        self.reset()

        self.run_guest(resets=1)
        self.finish()

    def reset(self):
        """Resets the paused machine; nothing is private afterwards."""
        self.qmp("system_reset")
        self.call("event", "RESET", limit=self.limit)
        backend = self.backends()["ram0"]
        self.check(backend["private-bytes"] == 0, f"memory is private after a reset: {backend}")

    def test_quit(self):
        self.start()
        backend = self.backends()["ram0"]
        self.check(backend["undecided-bytes"] == SIZE, f"pages are decided before the guest runs: {backend}")
        self.finish(expected=0)
