# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What the setup steps share: where things live, how progress is told, one
# lock so that two makes at once do not do the same step twice, and an apt
# whose package lists live under build/, so that the machine's own apt
# configuration is neither changed nor relied on.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=${UMEM_BUILD:-$ROOT/build}
STAMPS=$BUILD/stamps
MIRROR=${UMEM_MIRROR:-http://deb.debian.org/debian}
SECURITY_MIRROR=${UMEM_SECURITY_MIRROR:-http://deb.debian.org/debian-security}

export LC_ALL=C DEBIAN_FRONTEND=noninteractive

# say STEP TEXT...: one line of progress.
say() {
	local step=$1
	shift
	printf '==> %s: %s\n' "$step" "$*"
}

die() {
	printf 'error: %s\n' "$*" >&2
	exit 1
}

# with_lock NAME: held until this shell exits.
with_lock() {
	mkdir -p "$STAMPS"
	exec 9>"$STAMPS/$1.lock"
	if ! flock -n 9; then
		say "$1" "waiting for another make that does this step"
		flock 9
	fi
}

# stamp_fresh STAMP FILE...: true when STAMP is there and newer than each FILE.
stamp_fresh() {
	local stamp=$STAMPS/$1 file
	shift
	[ -e "$stamp" ] || return 1
	for file; do
		[ "$file" -nt "$stamp" ] && return 1
	done
	return 0
}

# need_packages STEP PACKAGE...: installs those that are missing.
need_packages() {
	local step=$1 package status missing=()
	shift
	for package; do
		status=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
		[ "${status:0:2}" = ii ] || missing+=("$package")
	done
	if [ "${#missing[@]}" = 0 ]; then
		say "$step" "every package is there"
		return
	fi
	say "$step" "installing ${missing[*]}"
	[ "$(id -u)" = 0 ] ||
		die "run as root, or install by hand: apt-get install --no-install-recommends ${missing[*]}"
	apt-get -q=2 update
	apt-get -q=2 -o Dpkg::Use-Pty=0 install -y --no-install-recommends "${missing[@]}" \
		>"$STAMPS/$step.log" 2>&1 || {
		tail -30 "$STAMPS/$step.log" >&2
		die "apt-get failed; all of it is in $STAMPS/$step.log"
	}
}

# The private apt: its lists, cache and sources are under $APT, and which
# suites it sees is chosen by apt_world.
APT=$BUILD/apt
SUITES=(bookworm bookworm-updates bookworm-backports bookworm-security)

# apt_world NAME SUITE...: another release's packages, in lists of their own.
# What is installed here means nothing there, and the newest version wins.
apt_world() {
	APT=$BUILD/apt-$1
	shift
	SUITES=("$@")
	mkdir -p "$APT"
	: >"$APT/status"
	printf 'Package: *\nPin: release *\nPin-Priority: 500\n' >"$APT/preferences"
}

private_apt() {
	local tool=$1 world=()
	shift
	if [ -e "$APT/preferences" ]; then
		world=(-o Dir::Etc::Preferences="$APT/preferences"
			-o Dir::Etc::PreferencesParts=/dev/null
			-o Dir::State::Status="$APT/status")
	fi
	"$tool" \
		-o Dir::Etc::SourceList="$APT/sources.list" \
		-o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State::Lists="$APT/lists" \
		-o Dir::Cache="$APT/cache" \
		-o APT::Sandbox::User=root \
		-o Acquire::Retries=3 \
		"${world[@]}" "$@"
}

# Fetches the private lists; once in a day is enough, since a package that has
# vanished from the mirror makes the download fail and FORCE is passed then.
private_apt_update() {
	local key=/usr/share/keyrings/debian-archive-keyring.gpg suite mirror
	mkdir -p "$APT/lists/partial" "$APT/cache/archives/partial"
	if [ "${1-}" != force ] &&
		[ -n "$(find "$APT/updated" -mmin -1440 2>/dev/null)" ]; then
		return 0
	fi
	[ -r "$key" ] || die "no $key: install debian-archive-keyring"
	for suite in "${SUITES[@]}"; do
		mirror=$MIRROR
		[ "$suite" = "${suite%-security}" ] || mirror=$SECURITY_MIRROR
		echo "deb [arch=amd64 signed-by=$key] $mirror $suite main"
	done >"$APT/sources.list"
	say apt "reading package lists into ${APT#"$ROOT"/} (not the machine's own)"
	private_apt apt-get -q=2 update
	touch "$APT/updated"
}

# fetch_debs PACKAGE[=VERSION|/SUITE]...: leaves the .deb files in $APT/debs.
fetch_debs() {
	mkdir -p "$APT/debs"
	(
		cd "$APT/debs"
		private_apt apt-get -q=2 download "$@" ||
			{
				private_apt_update force
				private_apt apt-get -q=2 download "$@"
			}
	)
}

# drop_debs PACKAGE...: what was unpacked need not be kept.
drop_debs() {
	local package
	for package; do
		rm -f "$(deb_of "$package")"
	done
}

# deb_of PACKAGE: the newest fetched file of that package.
deb_of() {
	local newest
	newest=$(find "$APT/debs" -name "$1_*.deb" -printf '%T@ %p\n' |
		sort -n | tail -1 | cut -d' ' -f2-)
	[ -n "$newest" ] || die "$1 was not fetched"
	printf '%s\n' "$newest"
}

# pack_initramfs STAGE FILE: takes the stage away.  Not compressed: unpacking costs
# more than reading under emulation.
pack_initramfs() {
	(cd "$1" && find . | LC_ALL=C sort |
		cpio --quiet -o -H newc --owner=0:0 --reproducible >"$2.new")
	mv "$2.new" "$2"
	rm -rf "$1"
}

# in_toolchain COMMAND...: runs it in the tree of setup-toolchain.sh, with the
# checkout and build/ at their places.  The mounts end with the command.
in_toolchain() {
	# shellcheck disable=SC2016 # the inner shell's variables
	unshare --mount bash -eu -c '
		tree=$1 root=$2 build=$3
		shift 3
		for dir in "$root" "$build" /proc /dev; do
			mkdir -p "$tree$dir"
			mount --rbind "$dir" "$tree$dir"
		done
		exec chroot "$tree" env PATH=/usr/bin:/usr/sbin "$@"
	' in_toolchain "$BUILD/toolchain" "$ROOT" "$BUILD" "$@"
}
