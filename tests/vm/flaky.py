# SPDX-License-Identifier: GPL-2.0-or-later
"""What of the emulated machine may be tried again."""

from typing import Final

import pytest

EMULATED_KVM: Final = pytest.mark.flaky(reruns=2, only_rerun=[r"GuestError: .*: not within \d+ s"])
"""For a test of a guest under KVM: the emulated one loses guests, whoever moved them, and when
nobody did (Documentation/testing.rst).  One that says nothing more, while its QEMU runs on, is
tried again, and the summary tells so.  One that finds its memory damaged is not, nor one that
panics or is reset, nor anything else that fails.
"""
