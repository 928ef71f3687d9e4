# SPDX-License-Identifier: GPL-2.0-or-later
"""What the conformance guest reports."""


def problem(text):
    """What is wrong with a guest's report; None if all of it is ok."""
    lines = text.splitlines()
    plans = [line for line in lines if line.startswith("1..")]
    if not plans:
        last = lines[-1] if lines else "nothing"
        return f"the guest's report is incomplete; the last it said: {last}"
    bad = [line for line in lines if line.startswith(("not ok", "Bail out!"))]
    if bad:
        return f"the guest says: {bad[0]}"
    good = sum(line.startswith("ok") for line in lines)
    if plans[-1] != f"1..{good}" or good == 0:
        return f"the guest reports {good} results but its plan is {plans[-1]}"
    return None
