# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migration measured: umem against QEMU's own, side by side in one machine."""
