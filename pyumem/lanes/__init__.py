# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes that move pages: one per lane and side, single-threaded, blocking, importing little
so that they start fast.
"""
