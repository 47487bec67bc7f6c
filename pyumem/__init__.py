# SPDX-License-Identifier: GPL-2.0-or-later
"""pyumem: post-copy live migration for stock QEMU, user-space half."""

__version__ = "0.1.0"
