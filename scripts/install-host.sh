#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# install-host.sh: what a host needs besides the package and the driver, to its places
# under $DESTDIR: units, user, runtime directory, udev rules, man pages, completion.
# umemctl is expected in $PREFIX/bin, with what pip calls pyumem[man]; while that is not
# there, as for a package, .venv does.  Nothing is started, and nothing of the machine asked.

. "$(dirname "$0")/lib.sh"

cd "$ROOT"
DESTDIR=${DESTDIR-}
PREFIX=${PREFIX:-/opt/umem}
python=$PREFIX/bin/python
[ -x "$python" ] || python=.venv/bin/python
pages=$(mktemp -d)
trap 'rm -r "$pages"' EXIT
"$python" scripts/make_man.py "$pages"

# put SOURCE TARGET: a file, in a directory that is made.
put() {
	install -D -m 644 "$1" "$DESTDIR$2"
}

for unit in umem.service umem.socket run-umem-areas.mount; do
	put "systemd/$unit" "/usr/lib/systemd/system/$unit"
done
sed -i "s,@bindir@,$PREFIX/bin," "$DESTDIR/usr/lib/systemd/system/umem.service"
put systemd/umem.sysusers.conf /usr/lib/sysusers.d/umem.conf
put systemd/umem.tmpfiles.conf /usr/lib/tmpfiles.d/umem.conf
put kmod/packaging/60-umem.rules /usr/lib/udev/rules.d/60-umem.rules
put kmod/packaging/umem.modprobe.conf /usr/share/doc/umem/umem.modprobe.conf
for page in "$pages"/*.1; do
	put "$page" "/usr/share/man/man1/${page##*/}"
done
complete() {
	mkdir -p "$DESTDIR$2"
	"$python" -c 'from pyumem.cli import main; main(prog_name="umemctl")' completion "$1" \
		>"$DESTDIR$2/$3"
}
complete bash /usr/share/bash-completion/completions umemctl
complete zsh /usr/share/zsh/vendor-completions _umemctl
complete fish /usr/share/fish/vendor_completions.d umemctl.fish
