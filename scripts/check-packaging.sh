#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# check-packaging.sh dkms LINE | rules | modinfo | man | units: one check of what is in
# kmod/dkms.conf, kmod/packaging/ and systemd/, and of what make install makes of it.
# Nothing of the machine is changed: dkms works on trees of its own under build/dkms/, and
# does not get as far as installing; make install works under build/lint/.

. "$(dirname "$0")/lib.sh"

cd "$ROOT"
tools=$BUILD/tools
version=$(sed -n 's/^PACKAGE_VERSION="\(.*\)"$/\1/p' kmod/dkms.conf)

# Build umem.ko as a machine with that kernel would.
check_dkms() {
	local dir=$BUILD/dkms/$1 release dkms
	release=$(<"$BUILD/kernels/$1/release")
	rm -rf "$dir"
	mkdir -p "$dir/source" "$dir/tree" "$dir/kmod"
	git ls-files --cached --others --exclude-standard -- kmod |
		while read -r file; do
			[ ! -e "$file" ] || echo "$file"
		done | cpio --quiet -pdm "$dir"
	# It signs with the machine's key, and makes one, unless there is no such tool.
	dkms=(env sign_file=/nonexistent "$tools/usr/sbin/dkms"
		--sourcetree "$dir/source" --dkmstree "$dir/tree"
		-k "$release/x86_64" --kernelsourcedir "$BUILD/kernels/$1/headers")
	"${dkms[@]}" add "$dir/kmod"
	"${dkms[@]}" build "umem/$version" || {
		cat "$dir/tree/umem/$version/build/make.log" >&2 || true
		die "dkms build for $release"
	}
	modinfo "$dir/tree/umem/$version/$release/x86_64/module/"umem.ko* |
		grep -q "^vermagic: *$release " || die "dkms built for another kernel"

	# It keeps off a kernel that lacks what we need.
	mkdir -p "$dir/bare/include"
	grep -v '^CONFIG_TMPFS=' "$BUILD/kernels/$1/headers/.config" >"$dir/bare/.config"
	dkms[-1]=$dir/bare
	dkms[-3]=$release-bare/x86_64
	if "${dkms[@]}" build "umem/$version" >"$dir/bare.log" 2>&1 ||
		! grep -q BUILD_EXCLUSIVE "$dir/bare.log"; then
		cat "$dir/bare.log" >&2
		die "dkms would build without CONFIG_TMPFS"
	fi
}

udevadm() {
	LD_LIBRARY_PATH=$tools/usr/lib/x86_64-linux-gnu/systemd "$tools/bin/udevadm" "$@"
}

check_rules() {
	local rules=kmod/packaging/60-umem.rules
	udevadm verify --resolve-names=never "$rules"
	# A check that finds nothing wrong with anything would be none.
	sed 's/GROUP=/GROUPP=/' "$rules" >"$BUILD/tools/bad.rules"
	if udevadm verify --resolve-names=never "$BUILD/tools/bad.rules" >/dev/null 2>&1; then
		die "udevadm verify does not see a wrong key"
	fi
}

# What people see of the module, and that all agree on it.
check_modinfo() {
	local module=$BUILD/lint/w1-6.12/umem.ko field value line name
	expect() {
		value=$(modinfo -F "$1" "$module")
		[ "$value" = "$2" ] || die "modinfo: $1 is '$value', not '$2'"
	}
	expect version "$version"
	expect license GPL
	expect alias fs-umem
	for field in description author srcversion vermagic; do
		[ -n "$(modinfo -F "$field" "$module")" ] || die "modinfo: no $field"
	done
	grep -q "^version = \"$version\"$" pyproject.toml ||
		die "pyproject.toml has another version than $version"
	# Every parameter is described, and is in the example; nothing else is.
	modinfo -F parm "$module" | while IFS=: read -r name line; do
		[[ $line == *\(*\) ]] || die "modinfo: parameter $name says '$line'"
	done
	diff <(modinfo -F parm "$module" | cut -d: -f1 | sort) \
		<(sed -n 's/^options umem \([a-z_]*\)=[0-9]*$/\1/p' \
			kmod/packaging/umem.modprobe.conf | sort) ||
		die "the parameters of the module and of umem.modprobe.conf differ"
}

# Each page is made without a warning, and read without one.
check_man() {
	local page said
	rm -rf "$BUILD/man"
	.venv/bin/python scripts/make_man.py "$BUILD/man"
	for page in "$BUILD"/man/*.1; do
		said=$(groff -ww -man -Tutf8 -rLL=80n -z "$page" 2>&1)
		[ -z "$said" ] || die "$page: $said"
	done
	[ -s "$BUILD/man/umem-qemu.1" ] || die "no umem-qemu.1"
}

# What make install puts down is what systemd takes.
check_units() {
	local root=$BUILD/lint/install units said unit exec
	rm -rf "$root"
	# A path where umemctl is, so that its being there is verified too.
	DESTDIR=$root PREFIX=$ROOT/.venv scripts/install-host.sh
	units=$root/usr/lib/systemd/system
	for unit in umem.service umem.socket run-umem-areas.mount; do
		said=$(systemd-analyze verify --man=no "$units/$unit" 2>&1) || die "$unit: $said"
		[ -z "$said" ] || die "$unit: $said"
	done
	# A check that finds nothing wrong with anything would be none.
	sed 's/^WatchdogSec=/WatchdogSecs=/' "$units/umem.service" >"$root/umem.service"
	said=$(systemd-analyze verify --man=no "$root/umem.service" 2>&1) || true
	[[ $said == *WatchdogSecs* ]] || die "systemd-analyze does not see a wrong key: $said"
	# Of ten; what is left is what it needs: network, devices, other users' processes.
	systemd-analyze security --offline=yes --threshold=19 --no-pager "$units/umem.service" ||
		die "umem.service is less confined than it was"
	exec=$(sed -n 's/^ExecStart=\([^ ]*\) .*/\1/p' "$units/umem.service")
	[ -x "$exec" ] || die "umem.service starts $exec"

	mkdir -p "$root/etc"
	printf 'root:x:0:0::/root:/bin/sh\n' >"$root/etc/passwd"
	printf 'root:x:0:\n' >"$root/etc/group"
	said=$(systemd-sysusers --root="$root" 2>&1) || die "systemd-sysusers: $said"
	grep -q '^kvm:.*:umem$' "$root/etc/group" || die "umem is not in kvm: $said"
	# Its ACL names a user whom this machine need not have.
	sed -e '/^a /d' -e 's/ umem / root /' -e 's/ kvm$/ root/' \
		"$root/usr/lib/tmpfiles.d/umem.conf" >"$root/tmpfiles.conf"
	said=$(systemd-tmpfiles --create --root="$root" "$root/tmpfiles.conf" 2>&1) ||
		die "systemd-tmpfiles: $said"
	[ -z "$said" ] || die "systemd-tmpfiles: $said"
	[ "$(stat -c %a "$root/run/umem/vm")" = 1770 ] || die "/run/umem/vm has another mode"
	bash -n "$root/usr/share/bash-completion/completions/umemctl"
}

what=${1:?usage: check-packaging.sh dkms LINE|rules|modinfo|man|units}
shift
"check_$what" "$@"
