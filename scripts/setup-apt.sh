#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-apt.sh: the Debian packages that building and testing need, installed
# only when one is missing.

. "$(dirname "$0")/lib.sh"

packages=(
	# building the module and the inner guest's programs
	gcc libc6-dev make bc dpkg-dev
	# the environment
	python3 python3-venv git ca-certificates debian-archive-keyring
	# the test machine
	qemu-system-x86 qemu-utils busybox-static cpio kmod udev iproute2 iputils-ping procps
	e2fsprogs util-linux lz4 zstd xz-utils
	# lint
	sparse shellcheck perl
)

with_lock apt
stamp_fresh apt "$0" && exit 0

missing=()
for package in "${packages[@]}"; do
	status=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
	[ "${status:0:2}" = ii ] || missing+=("$package")
done

if [ "${#missing[@]}" -gt 0 ]; then
	say apt "installing ${missing[*]}"
	[ "$(id -u)" = 0 ] ||
		die "run as root, or install by hand: apt-get install --no-install-recommends ${missing[*]}"
	apt-get -q=2 update
	apt-get -q=2 -o Dpkg::Use-Pty=0 install -y --no-install-recommends "${missing[@]}" \
		>"$STAMPS/apt.log" 2>&1 || {
		tail -30 "$STAMPS/apt.log" >&2
		die "apt-get failed; all of it is in $STAMPS/apt.log"
	}
else
	say apt "every package is there"
fi
touch "$STAMPS/apt"
