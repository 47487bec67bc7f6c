# SPDX-License-Identifier: GPL-2.0-or-later
"""What the log of writes costs: the driver against soft-dirty bits and mprotect(), in one boot."""
