#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# build-module.sh LINE [MAKE-ARGUMENT...]: builds kmod/ against the headers under
# build/kernels/<line>/ (see setup-kernel.sh) into build/kmod/<line>/umem.ko.  The sources are
# linked there, so that kbuild leaves its products there and not in kmod/.
# UMEM_KMOD_OUT chooses another directory than build/kmod/<line>.

. "$(dirname "$0")/lib.sh"

line=${1:?usage: build-module.sh LINE [MAKE-ARGUMENT...]}
shift
headers=$BUILD/kernels/$line/headers
out=${UMEM_KMOD_OUT:-$BUILD/kmod/$line}
[ -e "$headers/Makefile" ] || die "no headers for $line: run make setup"
[ -e "$ROOT/kmod/Kbuild" ] || die "kmod/Kbuild is not there"

with_lock "kmod-$line"
mkdir -p "$out"
# Links of sources that are gone would keep a stale build going.
find "$out" -xtype l -delete
cp -asfT "$ROOT/kmod" "$out"

case $line in
# It wants the compiler of unstable, see setup-toolchain.sh.
newest) in_toolchain make -C "$headers" M="$out" "$@" modules ;;
# It asks for the compiler that built it, which Debian 12 does not have.
5.10) make -C "$headers" M="$out" CC=gcc "$@" modules ;;
*) make -C "$headers" M="$out" "$@" modules ;;
esac
