#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-bench-guest.sh: the initramfs of the guest that make bench migrates:
# build/bench-guest/initramfs.cpio (busybox, redis, bench/migration/guest), and
# build/bench-guest/rawtcp.  Its kernel is that of the test guest.

. "$(dirname "$0")/lib.sh"

with_lock apt
from=$ROOT/bench/migration
stamp_fresh bench-guest "$0" "$from"/guest/* "$from/rawtcp.c" && exit 0
# redis-tools has the server's program too, by the name of a checker, and starts no service.
need_packages bench-guest redis-tools

say bench-guest "building the load and the initramfs"
dir=$BUILD/bench-guest
stage=$dir/initramfs.new
rm -rf "$stage"
mkdir -p "$stage"/{bin,proc,dev}
flags=(-O2 -Wall -Wextra -Werror -static)
gcc "${flags[@]}" -o "$dir/rawtcp" "$from/rawtcp.c"
gcc "${flags[@]}" -pthread -o "$stage/bin/load" "$from/guest/load.c"
cp /bin/busybox "$stage/bin/busybox"
ln -s busybox "$stage/bin/sh"
cp "$from/guest/init" "$stage/init"
cp -L /usr/bin/redis-check-rdb "$stage/bin/redis-server"
cp -L /usr/bin/redis-benchmark "$stage/bin/redis-benchmark"
ldd "$stage"/bin/redis-* |
	sed -n -e 's/.*=> \(\/[^ ]*\) .*/\1/p' -e 's/^\t\(\/[^ ]*\) .*/\1/p' | sort -u |
	while read -r lib; do
		mkdir -p "$stage$(dirname "$lib")"
		cp -L "$lib" "$stage$lib"
	done
pack_initramfs "$stage" "$dir/initramfs.cpio"
touch "$STAMPS/bench-guest"
