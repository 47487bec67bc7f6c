# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's contract and the traps of its design, run as root in a VM with umem.ko loaded."""
