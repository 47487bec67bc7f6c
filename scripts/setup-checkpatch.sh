#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-checkpatch.sh: checkpatch.pl and what it reads, and the semantic patches
# for coccinelle, out of Debian's kernel source package, to build/checkpatch/.  No
# smaller package has them.

. "$(dirname "$0")/lib.sh"

with_lock checkpatch
stamp_fresh checkpatch "$0" && exit 0
with_lock apt-lists
private_apt_update

say checkpatch "fetching linux-source-6.12 for its checkpatch.pl"
fetch_debs linux-source-6.12
rm -rf "$BUILD/checkpatch"
mkdir -p "$BUILD/checkpatch"
# --occurrence ends the inner tar at the last of them, before the end of the
# archive; the outer ones then find nobody to write to, which is fine.
set +o pipefail
dpkg-deb --fsys-tarfile "$(deb_of linux-source-6.12)" 2>/dev/null |
	tar -xO ./usr/src/linux-source-6.12.tar.xz 2>/dev/null |
	tar -xJ -C "$BUILD/checkpatch" --strip-components=2 --occurrence=1 \
		linux-source-6.12/scripts/checkpatch.pl \
		linux-source-6.12/scripts/coccinelle \
		linux-source-6.12/scripts/spelling.txt \
		linux-source-6.12/scripts/const_structs.checkpatch
set -o pipefail
[ -s "$BUILD/checkpatch/checkpatch.pl" ] || die "no checkpatch.pl in linux-source-6.12"
[ -d "$BUILD/checkpatch/coccinelle" ] || die "no scripts/coccinelle in linux-source-6.12"
drop_debs linux-source-6.12
touch "$STAMPS/checkpatch"
