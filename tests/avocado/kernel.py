# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel offers to confidential guests."""

import fcntl
import os
from pathlib import Path

# /dev/kvm's ioctl, the capability that lists types of VMs, and the type.
KVM_CHECK_EXTENSION = 0xAE03
KVM_CAP_VM_TYPES = 235
KVM_X86_SW_PROTECTED_VM = 1

# The lab kernel's parameter, and where strict mode has to begin for the conformance guest.
STRICT_FROM = Path("/sys/module/kvm/parameters/sw_protected_strict_from")
STRICT_AT = 4 << 30

# Is memory converted in place, as Linux 7.4 does?
IN_PLACE = Path("/sys/module/kvm/parameters/gmem_in_place_conversion")


def kvm_lacks():
    """Why confidential guests cannot run here; None if they can."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"KVM cannot be used: {error}"
    try:
        types = fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES)
    finally:
        os.close(kvm)
    if not types >> KVM_X86_SW_PROTECTED_VM & 1:
        return f"KVM offers no software-protected VMs (KVM_CAP_VM_TYPES is {types:#x})"
    return None


def strict_mode():
    """Does the kernel let accesses and attributes disagree, above 4 GiB?"""
    try:
        return int(STRICT_FROM.read_text(encoding="ascii"), 0) == STRICT_AT
    except (OSError, ValueError):
        return False


def in_place():
    """Is memory converted in one file, where a page keeps its data?"""
    try:
        return IN_PLACE.read_text(encoding="ascii").strip() == "Y"
    except OSError:
        return False
