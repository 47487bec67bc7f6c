#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-guest.sh: the guest that is migrated in tests and in the demo:
# build/guest/vmlinux (Debian's cloud kernel, unpacked, not installed),
# build/guest/initramfs.cpio (busybox, tests/guest/init, the workload, and drivers of
# what gives memory back), and
# build/guest/workload for tests on the host.

. "$(dirname "$0")/lib.sh"

with_lock guest
stamp_fresh guest "$0" "$ROOT"/tests/guest/* "$ROOT/scripts/extract-vmlinux.py" && exit 0
dir=$BUILD/guest
mkdir -p "$dir"
# In the order in which tests/guest/init loads them.
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci
	virtio_balloon virtio_mem virtio_blk)

if ! stamp_fresh guest-kernel "$0" "$ROOT/scripts/extract-vmlinux.py"; then
	with_lock apt-lists
	private_apt_update
	image=$(private_apt apt-cache depends linux-image-cloud-amd64 |
		sed -n 's/^ *Depends: //p' | grep -m1 '^linux-image-')
	say guest "fetching $image"
	fetch_debs "$image"
	rm -rf "$dir/kernel"
	mkdir -p "$dir/kernel"
	dpkg-deb -x "$(deb_of "$image")" "$dir/kernel"
	"$ROOT/scripts/extract-vmlinux.py" \
		"$dir/kernel/boot/vmlinuz-${image#linux-image-}" "$dir/vmlinux"
	rm -rf "$dir/modules"
	mkdir -p "$dir/modules"
	for module in "${modules[@]}"; do
		cp "$dir"/kernel/lib/modules/*/kernel/drivers/{virtio,block}/"$module.ko" \
			"$dir/modules/" 2>/dev/null || [ -e "$dir/modules/$module.ko" ] ||
			die "no module $module"
	done
	rm -rf "$dir/kernel"
	drop_debs "$image"
	touch "$STAMPS/guest-kernel"
fi

say guest "building the workload and the initramfs"
gcc -O2 -Wall -Wextra -Werror -static -pthread \
	-o "$dir/workload" "$ROOT/tests/guest/workload.c"
stage=$dir/initramfs.new
rm -rf "$stage"
mkdir -p "$stage"/{bin,proc,dev}
cp /bin/busybox "$stage/bin/busybox"
ln -s busybox "$stage/bin/sh"
cp "$dir/workload" "$stage/bin/workload"
cp "$ROOT/tests/guest/init" "$stage/init"
mkdir "$stage/modules"
for module in "${modules[@]}"; do
	cp "$dir/modules/$module.ko" "$stage/modules/"
done
pack_initramfs "$stage" "$dir/initramfs.cpio"
touch "$STAMPS/guest"
