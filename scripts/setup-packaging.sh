#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-packaging.sh: what make lint asks about packaging, and coccinelle, under
# build/tools/.  They are unpacked, not installed: dkms would hook itself into the
# machine's kernel packages, and the udevadm that can verify rules (254) is newer
# than Debian 12's own.

. "$(dirname "$0")/lib.sh"

with_lock packaging
stamp_fresh packaging "$0" && exit 0
with_lock apt-lists
private_apt_update

packages=(dkms coccinelle libpcre3 udev libsystemd-shared)
say packaging "fetching dkms, coccinelle and a newer udevadm"
fetch_debs dkms coccinelle libpcre3 {udev,libsystemd-shared}/bookworm-backports
rm -rf "$BUILD/tools"
mkdir -p "$BUILD/tools"
for package in "${packages[@]}"; do
	dpkg-deb -x "$(deb_of "$package")" "$BUILD/tools"
done
drop_debs "${packages[@]}"
touch "$STAMPS/packaging"
