# SPDX-License-Identifier: GPL-2.0-or-later
"""Sphinx configuration: `make docs` renders this folder into build/docs."""

project = "umem"
author = "The umem authors"
copyright = "2026, The umem authors"
extensions: list[str] = []
source_suffix = {".rst": "restructuredtext"}
html_theme = "alabaster"
nitpicky = True
