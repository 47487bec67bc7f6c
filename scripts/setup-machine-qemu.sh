#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# setup-machine-qemu.sh: a QEMU for the test machine itself, two lines of whose
# emulated processors are mended, built from Debian's source in some three
# minutes: build/machine-qemu/qemu-system-x86_64.  What is measured and moved in
# the machine stays stock.  Documentation/testing.rst (Traps of the emulation)
# says what it is for; make bench needs it.

. "$(dirname "$0")/lib.sh"

with_lock apt
stamp_fresh machine-qemu "$0" && exit 0
need_packages machine-qemu build-essential dpkg-dev ninja-build pkg-config python3-venv \
	libglib2.0-dev libfdt-dev libattr1-dev libcap-ng-dev zlib1g-dev

dir=$BUILD/machine-qemu
rm -rf "$dir"
mkdir -p "$dir/source"
apt_world trixie trixie
private_apt_update
sed 's/^deb /deb-src /' "$APT/sources.list" >"$dir/sources.list"
say machine-qemu "fetching QEMU's source"
source_apt() {
	apt-get -q=2 -o Dir::Etc::SourceList="$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State::Lists="$dir/lists" -o APT::Sandbox::User=root "$@"
}
mkdir -p "$dir/lists/partial"
source_apt update
(cd "$dir" && source_apt source --download-only qemu)
tar -xf "$(ls "$dir"/qemu_*.orig.tar.xz)" -C "$dir/source" --strip-components=1

# VMRUN delivers the interrupt by itself and leaves its vector behind as a pending
# exception: if the loop over translated blocks is left for another reason before
# the next #VMEXIT, it is delivered again.
svm=$dir/source/target/i386/tcg/system/svm_helper.c
sed -i '/case SVM_EVTINJ_TYPE_INTR:/,/break;/s/^\( *\)do_interrupt_x86_hardirq.*$/&\n\1cs->exception_index = -1;/' "$svm"
[ "$(grep -c 'exception_index = -1;' "$svm")" = 1 ] || die "$svm is not what the patch is for"
# Every processor that loads its FPU's state clears a flag of the first one, by
# reading and writing all flags of that one while it changes others itself.
fpu=$dir/source/target/i386/tcg/system/fpu_helper.c
sed -i '/^void cpu_clear_ignne/,/^}/s/^\( *\)env->hflags2 &=/\1if (env->hflags2 \& HF2_IGNNE_MASK)\n&/' "$fpu"
[ "$(grep -c 'if (env->hflags2 & HF2_IGNNE_MASK)' "$fpu")" = 1 ] || die "$fpu is not what the patch is for"
# Firmware comes with Debian's QEMU packages, and not with its source.
sed -i 's/^if unpack_edk2_blobs/if false/' "$dir/source/pc-bios/meson.build"

say machine-qemu "building it"
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" -q --disable-pip-version-check install meson==1.5.0 pycotap==1.3.1 setuptools
mkdir "$dir/made"
(
	cd "$dir/made"
	../source/configure --python="$dir/venv/bin/python" --target-list=x86_64-softmmu \
		--without-default-features --enable-system --enable-tcg --enable-virtfs --enable-attr \
		--disable-install-blobs --disable-docs --disable-tools --disable-werror
	ninja qemu-system-x86_64
) >"$dir/log" 2>&1 || {
	tail -20 "$dir/log" >&2
	die "QEMU does not build; all of it is in $dir/log"
}
strip -o "$dir/qemu" "$dir/made/qemu-system-x86_64"
data=$BUILD/qemu-10.0/usr/share
cat >"$dir/qemu-system-x86_64" <<WRAPPER
#!/bin/sh
# Written by scripts/setup-machine-qemu.sh.
exec "$dir/qemu" -L "$data/qemu" -L "$data/seabios" -L /usr/share/seabios -L /usr/share/qemu "\$@"
WRAPPER
chmod +x "$dir/qemu-system-x86_64"
rm -rf "$dir"/{source,made,venv,lists,sources.list} "$dir"/qemu_*
touch "$STAMPS/machine-qemu"
say machine-qemu "$("$dir/qemu-system-x86_64" --version | head -1)"
