#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# lint.sh [python|shell|kernel|packaging]...: every static check, all of them without an
# argument.  A finding fails, a tool that is missing fails too.  All checks run,
# so that one call shows everything.  more-kernels is for make test-kernels alone.

. "$(dirname "$0")/lib.sh"

cd "$ROOT"
PATH=$ROOT/.venv/bin:$PATH
failed=()

# check NAME COMMAND...: shows the output of a command that fails.
check() {
	local name=$1 output started=$SECONDS
	shift
	command -v "$1" >/dev/null || die "lint: $1 is missing: run make setup"
	if output=$("$@" 2>&1); then
		say lint "$name: fine ($((SECONDS - started)) s)"
	else
		say lint "$name: FAILED"
		printf '%s\n' "$output" | sed 's/^/    /'
		failed+=("$name")
	fi
}

# silent COMMAND...: fails on any line of output that warns, too.
silent() {
	local output status=0
	output=$("$@" 2>&1) || status=$?
	printf '%s\n' "$output"
	if grep -q -i -E 'warning|error' <<<"$output"; then
		status=1
	fi
	return "$status"
}

# A build of its own for each way of checking, always from the beginning: kbuild
# tells a warning only when it compiles.
build() {
	local line=$1 out=$BUILD/lint/$2-$1
	shift 2
	rm -rf "$out"
	UMEM_KMOD_OUT=$out silent scripts/build-module.sh "$line" "$@"
}

# Files of one kind, of those that git knows or would add.
tracked() {
	git ls-files --cached --others --exclude-standard -- "$@" |
		while read -r file; do
			[ -e "$file" ] && printf '%s\n' "$file"
		done
}

# Scripts whose first line names a shell.
shell_scripts() {
	tracked | while read -r file; do
		case $file in
		*.sh) printf '%s\n' "$file" ;;
		*.*) ;;
		*) if head -1 "$file" 2>/dev/null | grep -a -q -E '^#!.*[/ ](ba|da)?sh'; then
			printf '%s\n' "$file"
		fi ;;
		esac
	done
}

spdx() {
	local file status=0
	while read -r file; do
		[ -s "$file" ] || continue
		if ! head -3 "$file" | grep -q 'SPDX-License-Identifier: '; then
			echo "$file: no SPDX line"
			status=1
		fi
	done < <(tracked '*.py' '*.sh' '*.c' '*.h' '*/Kbuild' Makefile pyproject.toml \
		kmod/dkms.conf 'kmod/packaging/*' 'systemd/*')
	return "$status"
}

lint_python() {
	local python_programs
	python_programs=$(tracked | while read -r file; do
		case $file in *.*) continue ;; esac
		head -1 "$file" 2>/dev/null | grep -a -q '^#!.*python' && echo "$file"
	done || true)
	# shellcheck disable=SC2086 # a list of names without blanks
	check "ruff check" ruff check . $python_programs
	# shellcheck disable=SC2086
	check "ruff format" ruff format --check . $python_programs
	check "mypy --strict" mypy
}

lint_shell() {
	local scripts
	mapfile -t scripts < <(shell_scripts)
	check "shellcheck" shellcheck -x -P scripts "${scripts[@]}"
	check "SPDX lines" spdx
}

lint_kernel() {
	local line sources
	mapfile -t sources < <(tracked 'kmod/*.c' 'kmod/*.h' kmod/Kbuild)
	for line in 6.1 6.12; do
		check "W=1 build for $line" build "$line" w1 W=1
		check "sparse for $line" build "$line" sparse C=2 CF=-D__CHECK_ENDIAN__
	done
	# Tracepoints are written the way the kernel's own are, which checkpatch finds odd.
	check "checkpatch --strict" perl build/checkpatch/checkpatch.pl \
		--no-tree --strict --terse --show-types --no-summary \
		-f "${sources[@]/kmod\/trace.h/kmod\/umem.h}"
	check "checkpatch --strict, tracepoints" perl build/checkpatch/checkpatch.pl \
		--no-tree --strict --terse --show-types --no-summary \
		--ignore OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT -f kmod/trace.h
	check "kernel-doc" silent perl \
		build/kernels/6.12/usr/lib/linux-kbuild-*/scripts/kernel-doc \
		-none -Werror "${sources[@]/#kmod\/Kbuild/kmod\/umem.h}"
	check "coccinelle" scripts/check-cocci.sh
}

lint_more_kernels() {
	local line
	for line in 5.10 newest; do
		check "W=1 build for $line" build "$line" w1 W=1
	done
}

lint_packaging() {
	local line
	for line in 6.1 6.12; do
		check "dkms build for $line" scripts/check-packaging.sh dkms "$line"
	done
	check "udev rules" scripts/check-packaging.sh rules
	check "modinfo" scripts/check-packaging.sh modinfo
	check "man pages" scripts/check-packaging.sh man
	check "installed files, systemd units" scripts/check-packaging.sh units
}

for part in "${@:-python shell kernel packaging}"; do
	for one in $part; do
		"lint_${one//-/_}"
	done
done

if [ "${#failed[@]}" -gt 0 ]; then
	printf -v list '%s, ' "${failed[@]}"
	die "lint: ${list%, }"
fi
