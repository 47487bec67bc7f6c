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

# The private apt: its lists, cache and sources are under build/apt.
private_apt() {
	local tool=$1
	shift
	"$tool" \
		-o Dir::Etc::SourceList="$BUILD/apt/sources.list" \
		-o Dir::Etc::SourceParts=/dev/null \
		-o Dir::State::Lists="$BUILD/apt/lists" \
		-o Dir::Cache="$BUILD/apt/cache" \
		-o APT::Sandbox::User=root \
		-o Acquire::Retries=3 \
		"$@"
}

# Fetches the private lists; once in a day is enough, since a package that has
# vanished from the mirror makes the download fail and FORCE is passed then.
private_apt_update() {
	local key=/usr/share/keyrings/debian-archive-keyring.gpg suite
	mkdir -p "$BUILD/apt/lists/partial" "$BUILD/apt/cache/archives/partial"
	if [ "${1-}" != force ] &&
		[ -n "$(find "$BUILD/apt/updated" -mmin -1440 2>/dev/null)" ]; then
		return 0
	fi
	[ -r "$key" ] || die "no $key: install debian-archive-keyring"
	{
		for suite in bookworm bookworm-updates bookworm-backports; do
			echo "deb [arch=amd64 signed-by=$key] $MIRROR $suite main"
		done
		echo "deb [arch=amd64 signed-by=$key] $SECURITY_MIRROR bookworm-security main"
	} >"$BUILD/apt/sources.list"
	say apt "reading package lists into build/apt (not the machine's own)"
	private_apt apt-get -q=2 update
	touch "$BUILD/apt/updated"
}

# fetch_debs PACKAGE[=VERSION|/SUITE]...: leaves the .deb files in build/apt/debs.
fetch_debs() {
	mkdir -p "$BUILD/apt/debs"
	(
		cd "$BUILD/apt/debs"
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
	newest=$(find "$BUILD/apt/debs" -name "$1_*.deb" -printf '%T@ %p\n' |
		sort -n | tail -1 | cut -d' ' -f2-)
	[ -n "$newest" ] || die "$1 was not fetched"
	printf '%s\n' "$newest"
}
