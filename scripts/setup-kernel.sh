#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-kernel.sh 5.10|6.1|6.12|newest: unpacks Debian's newest kernel of that
# line, image and headers, under build/kernels/<line>/.  Nothing is installed: the
# paths inside the headers that assume / are rewritten to where they lie.
# build/kernels/<line>/release names the version that was taken.  5.10 is Debian
# 11's; newest is whatever unstable or experimental has.

. "$(dirname "$0")/lib.sh"

line=${1:?usage: setup-kernel.sh 5.10|6.1|6.12|newest}
case $line in
6.1) meta=amd64 ;;
6.12) meta=6.12-amd64 ;;
5.10 | newest) meta=amd64 ;;
*) die "no kernel line $line here; 5.10, 6.1, 6.12 and newest are known" ;;
esac

with_lock "kernel-$line"
stamp_fresh "kernel-$line" "$0" && exit 0
case $line in
5.10) apt_world bullseye bullseye bullseye-security ;;
newest) apt_world unstable sid experimental ;;
esac
with_lock apt-lists
private_apt_update

# depends PACKAGE PATTERN: the first dependency whose name matches.
depends() {
	private_apt apt-cache depends "$1" |
		sed -n 's/^ *Depends: //p' | grep -m1 -E "$2"
}

image=$(depends "linux-image-$meta" '^linux-image-')
headers=$(depends "linux-headers-$meta" '^linux-headers-')
common=$(depends "$headers" '^linux-headers-.*-common$')
kbuild=$(depends "$headers" '^linux-kbuild-')
release=${image#linux-image-}
[ "$release" = "${headers#linux-headers-}" ] ||
	die "the mirror's image ($image) and headers ($headers) differ"

packages=("$image" "$headers" "$common" "$kbuild")
# Since 7.3 the package of the image only depends on what is in it.
for part in binary modules base; do
	name=$(depends "$image" "^linux-$part-[0-9].*-amd64$") && packages+=("$name")
done

say "kernel-$line" "fetching $image and its headers"
fetch_debs "${packages[@]}"

dir=$BUILD/kernels/$line
say "kernel-$line" "unpacking under ${dir#"$ROOT"/}"
rm -rf "$dir.new"
mkdir -p "$dir.new/usr/lib"
# Newer packages have everything under /usr.
ln -s usr/lib "$dir.new/lib"
for package in "${packages[@]}"; do
	dpkg-deb -x "$(deb_of "$package")" "$dir.new"
done
printf '%s\n' "$release" >"$dir.new/release"

# The image is among the modules there.
if [ ! -e "$dir.new/boot/vmlinuz-$release" ]; then
	mkdir -p "$dir.new/boot"
	mv "$dir.new/lib/modules/$release/vmlinuz" "$dir.new/boot/vmlinuz-$release"
fi

src=$dir.new/usr/src/$headers
sed -i "s:/usr/src/:$dir/usr/src/:" "$src/Makefile"
# Without this copy of vmlinux kbuild skips BTF for modules, which would need
# pahole on the machine.
rm -f "$src/vmlinux"
ln -sfn "../../../usr/src/$headers" "$dir.new/lib/modules/$release/build"
ln -sfn "../../../usr/src/$common" "$dir.new/lib/modules/$release/source"
ln -sfn "usr/src/$headers" "$dir.new/headers"
ln -sfn "usr/src/$common" "$dir.new/common"
ln -sfn "boot/vmlinuz-$release" "$dir.new/vmlinuz"
depmod -b "$dir.new" "$release"

drop_debs "${packages[@]}"
rm -rf "$dir"
mv "$dir.new" "$dir"
touch "$STAMPS/kernel-$line"
say "kernel-$line" "$release is ready"
