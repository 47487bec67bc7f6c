#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-qemu10.sh: QEMU 10.0, as Debian 13 has it, from bookworm-backports,
# unpacked under build/qemu-10.0 with the libraries that the machine lacks.
# build/qemu-10.0/qemu-system-x86_64 runs it.

. "$(dirname "$0")/lib.sh"

with_lock qemu-10.0
stamp_fresh qemu-10.0 "$0" && exit 0
with_lock apt-lists
private_apt_update

# What apt would install on this machine for it, without doing so: the packages
# that are missing or too old here.
mapfile -t packages < <(private_apt apt-get -q=2 -s --no-install-recommends \
	-t bookworm-backports install qemu-system-x86 |
	sed -n -E 's/^Inst ([^ ]+) (\[[^]]*\] )?\(([^ ]+) .*/\1=\3/p' |
	grep -v -E '^(qemu-utils|qemu-block-extra)=')
printf '%s\n' "${packages[@]}" | grep -q '^qemu-system-x86=1:10\.' ||
	die "bookworm-backports offers no QEMU 10"

dir=$BUILD/qemu-10.0
say qemu-10.0 "fetching ${packages[*]}"
fetch_debs "${packages[@]}"
rm -rf "$dir.new"
mkdir -p "$dir.new"
for package in "${packages[@]}"; do
	dpkg-deb -x "$(deb_of "${package%%=*}")" "$dir.new"
done

drop_debs "${packages[@]%%=*}"

# QEMU finds its modules and firmware relative to the place of its binary when
# it was moved; the libraries it cannot.
cat >"$dir.new/qemu-system-x86_64" <<'WRAPPER'
#!/bin/sh
# Written by scripts/setup-qemu10.sh.
here=$(dirname "$(readlink -f "$0")")
lib=$here/usr/lib/x86_64-linux-gnu
LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
QEMU_MODULE_DIR=$lib/qemu
export LD_LIBRARY_PATH QEMU_MODULE_DIR
exec "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/qemu" \
	-L "$here/usr/share/seabios" -L /usr/share/seabios -L /usr/share/qemu "$@"
WRAPPER
chmod +x "$dir.new/qemu-system-x86_64"
rm -rf "$dir"
mv "$dir.new" "$dir"
version=$("$dir/qemu-system-x86_64" --version | head -1)
case $version in
*"version 10."*) ;;
*) die "build/qemu-10.0/qemu-system-x86_64 says: $version" ;;
esac
touch "$STAMPS/qemu-10.0"
say qemu-10.0 "$version"
