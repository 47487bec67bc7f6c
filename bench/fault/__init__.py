# SPDX-License-Identifier: GPL-2.0-or-later
"""What a page fault costs: the driver against userfaultfd, C against C, in one boot."""
