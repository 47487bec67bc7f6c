#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# check-cocci.sh: the kernel's own semantic patches over kmod/, in report mode.
# Every line of output is a finding.

. "$(dirname "$0")/lib.sh"

cd "$ROOT"
export COCCINELLE_HOME=$BUILD/tools/usr/lib/coccinelle
export LD_LIBRARY_PATH=$BUILD/tools/usr/lib/x86_64-linux-gnu:$BUILD/tools/lib/x86_64-linux-gnu
export SPATCH=$BUILD/tools/usr/bin/spatch

# spatch_all DIR [NAME]: one process for each semantic patch, as many as there are
# CPUs; those alone whose path matches NAME.
spatch_all() {
	# shellcheck disable=SC2016 # the inner shell expands them
	#
	# Two are written in OCaml, whose compiler is not here; those for buses and for
	# device trees, of which we have nothing, take their time like all others.
	grep -rl --include='*.cocci' 'virtual report' "$BUILD/checkpatch/coccinelle" |
		grep -E "${2-.}" | grep -vE '/(of_|platform_|pci_|clk_|pm_|irqf_|devm_|device_node)' |
		xargs grep -L 'script:ocaml\|initialize:ocaml' |
		xargs -P "$(nproc)" -I{} sh -c '
			"$SPATCH" -D report --very-quiet --no-show-diff --cocci-file "$1" \
				--dir "$2" -I "$2/include/uapi" -I "$2" 2>&1 |
				grep -v "^warning: line .* be a metavariable?$"' sh {} "$1" ||
		true
}

# Does it find what it is there for?  Without Python, for one, it finds nothing.
probe=$BUILD/lint/cocci-probe
rm -rf "$probe"
mkdir -p "$probe"
cat >"$probe/probe.c" <<'END'
void *probe(struct thing *t)
{
	void *p;

	p = kmalloc(10, GFP_KERNEL);
	if (!p)
		return ERR_PTR(PTR_ERR(t->q));
	memset(p, 0, 10);
	kfree(t);
	t->q = p;
	return p;
}
END
found=$(spatch_all "$probe" '/(err_cast|zalloc-simple|kfree)\.cocci$')
for what in 'ERR_CAST' 'kzalloc' 'reference preceded by free'; do
	grep -q "$what" <<<"$found" ||
		die "coccinelle does not find a planted fault ($what); it says: $found"
done

found=$(spatch_all kmod)
if [ -n "$found" ]; then
	printf '%s\n' "$found"
	exit 1
fi
