#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-toolchain.sh: the compiler and libraries of Debian unstable, unpacked to
# build/toolchain: the headers of the newest kernel bring programs that this
# machine's libc cannot run, and ask for the compiler that built it.  Nothing of
# it is configured; scripts/build-module.sh uses it through a chroot.

. "$(dirname "$0")/lib.sh"

with_lock toolchain
stamp_fresh toolchain "$0" && exit 0
apt_world unstable sid experimental
private_apt_update

# The headers name the compiler and the libraries of their programs.
mapfile -t packages < <(private_apt apt-get -q=2 -s --no-install-recommends install \
	linux-headers-amd64 make dash bash coreutils findutils sed grep gawk |
	sed -n -E 's/^Inst ([^ ]+) \(([^ ]+) .*/\1=\2/p' | grep -v '^linux-')
[ "${#packages[@]}" -gt 0 ] || die "unstable offers no tool chain"

say toolchain "fetching ${#packages[@]} packages of unstable"
fetch_debs "${packages[@]}"
dir=$BUILD/toolchain
rm -rf "$dir.new"
mkdir -p "$dir.new"/usr/{bin,sbin,lib,lib64} "$dir.new"/{proc,dev,tmp}
for name in bin sbin lib lib64; do
	ln -s "usr/$name" "$dir.new/$name"
done
for package in "${packages[@]}"; do
	dpkg-deb -x "$(deb_of "${package%%=*}")" "$dir.new"
done
ln -sf gawk "$dir.new/usr/bin/awk"
drop_debs "${packages[@]%%=*}"

rm -rf "$dir"
mv "$dir.new" "$dir"
gcc=$(find "$dir/usr/bin" -name 'x86_64-linux-gnu-gcc-[0-9]*' -printf '%f\n' | head -1)
say toolchain "$(chroot "$dir" "$gcc" --version | head -1)"
touch "$STAMPS/toolchain"
