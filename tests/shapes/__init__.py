# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines and hosts of unusual shapes, too slow for `make test`: `make test-shapes` runs them."""
