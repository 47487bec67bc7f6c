#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# check-docs.sh: renders Documentation/ into build/docs; any warning is an error.

. "$(dirname "$0")/lib.sh"

cd "$ROOT"
.venv/bin/python -m sphinx -q -W --keep-going -b html -d build/doctrees Documentation build/docs
say docs "build/docs/index.html is ready"
