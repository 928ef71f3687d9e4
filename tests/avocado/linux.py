# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest that works in private memory, on every discard policy, with and without lazy attributes."""

import os
import re

from confidential import MIB, ConfidentialTest

# A device that reaches no memory but what the guest has shared.
VIRTIO = "iommu_platform=on,disable-legacy=on"

# Of the guest's memory, what is private at least, in percent. The rest is the kernel's image, its map of pages, bounce
# buffers, and what was in use when free memory was converted.
PRIVATE_PERCENT = 85


class LinuxTest(ConfidentialTest):
    """Boots the guest, which checks what it is told to, and switches itself off."""

    def boot(self, discard, smp, lazy):
        kernel = self.params.get("linux", default="")
        disk = self.params.get("linux_disk", default="")
        if not (os.path.exists(kernel) and os.path.exists(disk)):
            self.cancel("no Linux guest: name its kernel and its disk with -p linux=FILE -p linux_disk=FILE")
        job = self.params.get("linux_job", default="look")
        append = (
            "console=ttyS0 loglevel=4 panic=-1 root=/dev/vda rw init=/usr/sbin/lab-init"
            f" kvm_sw_protected=on swiotlb=8192 lab_do={job}"
        )
        self.start(
            "-kernel", kernel, "-append", append,
            "-drive", f"if=none,id=root,format=raw,snapshot=on,file={disk}",
            "-device", f"virtio-blk-pci,drive=root,{VIRTIO}",
            backend=self.choose_properties(discard, lazy), smp=smp, size=512 * MIB,
        )
        self.check_properties(discard, lazy)
        # It may reboot once, and SeaBIOS resets the machine afterwards.
        self.run_guest(resets=2)
        backend = self.check_conversions()
        said = re.findall(r"# private-bytes=(\d+)", self.machine.serial())
        private = backend["private-bytes"]
        self.check(said and int(said[-1]) == private, f"QEMU has {private} private bytes, the guest says {said}")
        percent = private * 100 // backend["size"]
        self.check(percent >= PRIVATE_PERCENT, f"{percent} % of the guest's memory are private: {backend}")
        self.check(backend["refused"] == 0, f"conversions were refused: {backend}")
        self.finish(expected=0)


class Linux(LinuxTest):
    """One combination."""

    def test_now_1_cpu(self):
        self.boot("now", 1, "off")


class LinuxMore(LinuxTest):
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

    def test_keep_1_cpu(self):
        self.boot("keep", 1, "off")

    def test_keep_1_cpu_lazy(self):
        self.boot("keep", 1, "on")

    def test_keep_4_cpus(self):
        self.boot("keep", 4, "off")

    def test_keep_4_cpus_lazy(self):
        self.boot("keep", 4, "on")
