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
	e2fsprogs util-linux openssl lz4 zstd xz-utils
	# lint
	sparse shellcheck perl systemd groff-base
)

with_lock apt
stamp_fresh apt "$0" && exit 0

need_packages apt "${packages[@]}"
touch "$STAMPS/apt"
