#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# make-vm-image.sh: build/vm/root.img, a read-only disk with what the test
# machine starts again and again: Python, the packages of .venv, QEMU and their
# libraries, and the inner guest.  The machine's root comes over 9p, where every open is a round
# trip and starting pytest takes 15 s; from this disk it takes 2.  The disk is
# laid over /usr and .venv, so what it lacks is still found below it.

. "$(dirname "$0")/lib.sh"

with_lock vm-image
stamp_fresh vm-image "$0" "$STAMPS/venv" "$STAMPS/apt" "$STAMPS/qemu-10.0" \
	"$STAMPS/guest" && exit 0
say vm-image "writing build/vm/root.img"

stage=$BUILD/vm/root.new
rm -rf "$stage"
# The machine hangs its modules into lib/modules.
mkdir -p "$stage/usr/lib/modules" "$stage/venv"

# put FILE...: copies files or directories of /usr into the stage.
put() {
	local path name real
	for path; do
		[ -e "$path" ] || continue
		real=$(realpath "$path")
		for name in "$path" "$real"; do
			# /lib and /bin are links into /usr.
			case $name in
			/usr/*) ;;
			/lib/* | /lib64/* | /bin/* | /sbin/*) name=/usr$name ;;
			*) continue ;;
			esac
			[ -e "$stage$name" ] && continue
			mkdir -p "$stage$(dirname "$name")"
			cp -a "$name" "$stage$name"
		done
	done
}

programs=(/usr/bin/python3 /usr/bin/qemu-system-x86_64 /usr/bin/bash /usr/bin/env)
programs+=(/usr/sbin/ip /usr/sbin/tc /usr/bin/kmod /usr/bin/udevadm /usr/lib/systemd/systemd-udevd)
put "${programs[@]}" /usr/share/qemu /usr/share/seabios /usr/lib/ipxe/qemu
put /usr/lib/python3.*
put /usr/lib/x86_64-linux-gnu/qemu
libs=$(ldd "${programs[@]}" /usr/lib/x86_64-linux-gnu/qemu/accel-*.so \
	/usr/lib/python3.*/lib-dynload/*.so 2>/dev/null |
	sed -n -e 's/.*=> \(\/[^ ]*\) .*/\1/p' -e 's/^\t\(\/[^ ]*\) .*/\1/p' | sort -u)
while read -r lib; do
	put "$lib"
done <<<"$libs"
rm -rf "$stage"/usr/lib/python3.*/{test,idlelib,turtledemo,config-*}

# The tools that never run in the machine stay on 9p.
cp -a "$ROOT/.venv/." "$stage/venv"
rm -rf "$stage"/venv/bin/{ruff,virtme*,vng*}
for package in mypy mypyc ruff virtme virtme_ng pip virtualenv nodeenv matplotlib mpl_toolkits \
	numpy numpy.libs PIL pillow.libs fontTools kiwisolver contourpy; do
	rm -rf "$stage"/venv/lib/python3.*/site-packages/"$package"
done

cp -a "$BUILD/qemu-10.0" "$BUILD/guest" "$stage/"

kib=$(du -sk --apparent-size "$stage" | cut -f1)
files=$(find "$stage" | wc -l)
image=$BUILD/vm/root.img
rm -f "$image.new"
/usr/sbin/mke2fs -q -t ext4 -O '^has_journal,^metadata_csum,^64bit' -m 0 \
	-N $((files + 1000)) -d "$stage" "$image.new" $((kib * 5 / 4 + 32768))k >/dev/null
mv "$image.new" "$image"
rm -rf "$stage"
touch "$STAMPS/vm-image"
