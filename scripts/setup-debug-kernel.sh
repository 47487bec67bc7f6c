#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-debug-kernel.sh: builds a kernel that looks for bugs (KASAN, lockdep,
# kmemleak, fault injection; see debug-kernel.config) from Debian's
# linux-source-6.12, and lays it under build/kernels/debug/ as
# setup-kernel.sh lays Debian's own.  The source tree stays in build/debug, since
# modules are built against it.

. "$(dirname "$0")/lib.sh"

wanted=$ROOT/scripts/debug-kernel.config
package=linux-source-6.12
dir=$BUILD/kernels/debug
work=$BUILD/debug

with_lock kernel-debug
stamp_fresh kernel-debug "$0" "$wanted" && exit 0
need_packages debug-kernel flex bison libelf-dev libssl-dev

# What is unpacked is taken again: a build that was stopped goes on.
unpack() {
	[ -e "$work/unpacked" ] && return
	say kernel-debug "fetching and unpacking $package"
	(
		with_lock apt-lists
		private_apt_update
		fetch_debs "$package"
	)
	rm -rf "$work"
	mkdir -p "$work/linux"
	dpkg-deb --fsys-tarfile "$(deb_of "$package")" |
		tar -xO "./usr/src/$package.tar.xz" |
		tar -xJ -C "$work/linux" --strip-components=1
	drop_debs "$package"
	touch "$work/unpacked"
}

kmake() {
	nice -n 19 make -s -C "$work/linux" -j"$(nproc)" ARCH=x86_64 \
		KBUILD_BUILD_TIMESTAMP=1970-01-01 "$@"
}

# Options that depend on something that is not there vanish without a word.
check_config() {
	local line name missing=()
	while read -r line; do
		case $line in
		CONFIG_*=n)
			name=${line%=n}
			! grep -q "^$name=" "$work/linux/.config" || missing+=("$line")
			;;
		CONFIG_*)
			grep -qxF "$line" "$work/linux/.config" || missing+=("$line")
			;;
		esac
	done <"$wanted"
	[ "${#missing[@]}" = 0 ] ||
		die "not so in the debug kernel's .config: ${missing[*]}"
}

unpack
say kernel-debug "configuring"
kmake tinyconfig >/dev/null
(cd "$work/linux" && ARCH=x86_64 scripts/kconfig/merge_config.sh -m .config "$wanted" >/dev/null)
kmake olddefconfig
check_config

say kernel-debug "building, some ten minutes on two processors"
kmake bzImage modules
release=$(kmake kernelrelease)

rm -rf "$dir.new"
mkdir -p "$dir.new/boot"
kmake INSTALL_MOD_PATH="$dir.new" DEPMOD=true modules_install
depmod -b "$dir.new" "$release"
cp "$work/linux/arch/x86/boot/bzImage" "$dir.new/boot/vmlinuz-$release"
cp "$work/linux/System.map" "$dir.new/boot/System.map-$release"
cp "$work/linux/.config" "$dir.new/boot/config-$release"
rm -f "$dir.new/lib/modules/$release/source"
ln -sfn ../../../headers "$dir.new/lib/modules/$release/build"
ln -sfn ../../debug/linux "$dir.new/headers"
ln -sfn "boot/vmlinuz-$release" "$dir.new/vmlinuz"
printf '%s\n' "$release" >"$dir.new/release"

rm -rf "$dir"
mv "$dir.new" "$dir"
touch "$STAMPS/kernel-debug"
say kernel-debug "$release is ready"
