# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements; each folder is one `make bench-*`."""
