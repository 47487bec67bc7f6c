# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line `umemctl`: one module per command, each thin; imported only when it is asked
for.
"""

from pyumem.cli.main import main

__all__ = ["main"]
