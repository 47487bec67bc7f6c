#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-shapes.sh: what make test-shapes needs besides: a QEMU for a guest whose
# pages are larger than the host's (alpha).

. "$(dirname "$0")/lib.sh"

with_lock apt
stamp_fresh shapes "$0" && exit 0

need_packages shapes qemu-system-misc
touch "$STAMPS/shapes"
