#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-venv.sh: .venv with the pinned packages of pyproject.toml and pyumem
# itself, editable.  The system's Python is taken, which the test machine has too.

. "$(dirname "$0")/lib.sh"

with_lock venv
stamp_fresh venv "$0" "$ROOT/pyproject.toml" && exit 0

python=/usr/bin/python3
[ -x "$python" ] || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	die "$python is older than 3.11"

say venv "making .venv with $("$python" -V)"
[ -x "$ROOT/.venv/bin/pip" ] || "$python" -m venv --clear "$ROOT/.venv"
"$ROOT/.venv/bin/pip" install -qq --disable-pip-version-check --no-input \
	-e "${ROOT}[dev]"
touch "$STAMPS/venv"
