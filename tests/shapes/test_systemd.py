# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon under the units of systemd/, as systemd runs them: started by the first connection,
hardened, and brought back when it hangs or is killed, while a guest needs it.

systemd is the first process of a pid namespace in the destination's network.  What is not about the
daemon (journal, udev, file systems) is masked.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pyumem import runtime
from tests.migration.test_unprivileged import RUNNER, SYSTEMD, as_user, installed
from tests.migration.test_whole import SPEC
from tests.migration.world import LAUNCHER, PATIENCE, PORT, Program, World, alive, eventually, world

ROOT = Path(__file__).parents[2]
UNIT = "umem.service"
SCRIPT = r"""
set -e
shopt -s nullglob
mount --make-rprivate /
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
umount -l /sys/fs/cgroup || true # its root is the machine's
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /etc/systemd/system
cp -r "$1"/. /etc/systemd/system
for unit in /lib/systemd/system/{sysinit,basic,sockets,local-fs,timers}.target.wants/*; do
    ln -sf /dev/null /etc/systemd/system/"${unit##*/}"
done
exec env -i PATH="$PATH" container=umem-test /lib/systemd/systemd --unit=basic.target \
    --log-target=null --show-status=0
"""


def write_units(to: Path, log: Path) -> None:
    """Put the units as make install does, and what an operator would add for this machine."""
    for unit in SYSTEMD.iterdir():
        if unit.suffix in (".service", ".socket", ".mount"):
            text = unit.read_text().replace("@bindir@", str(Path(sys.executable).parent))
            (to / unit.name).write_text(text)
    more = to / f"{UNIT}.d"
    more.mkdir()
    (more / "test.conf").write_text(
        "[Service]\n"
        "Environment=UMEM_INSECURE=1\n"
        f"StandardOutput=append:{log}\nStandardError=append:{log}\n"
        # A checkout may lie where an installation does not.
        f"ProtectHome=tmpfs\nBindReadOnlyPaths={ROOT} {sys.prefix}\n"
    )


@dataclass
class Systemd:
    """One that runs; commands go into its namespaces."""

    program: Program
    pid: int
    """As the machine knows it."""
    log: Path
    """What the daemon says."""

    def inside(self, *argv: str) -> tuple[str, ...]:
        """Return the command line that runs ARGV where the units run."""
        return ("nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--", *argv)

    def run(self, *argv: str) -> str:
        """Return what a command prints."""
        inside = self.inside(*argv)
        done = subprocess.run(inside, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{argv}: {done.stderr}\n{self.said()}"
        return done.stdout

    def show(self, what: str) -> int:
        """Return a number that it knows of the daemon's unit."""
        return int(self.run("systemctl", "show", "--property", what, "--value", UNIT))

    def kill(self, signum: signal.Signals) -> None:
        """Send the daemon itself a signal, not its workers."""
        self.run("kill", f"-{signum.value}", str(self.show("MainPID")))

    def said(self) -> str:
        daemon = self.log.read_text() if self.log.exists() else ""
        return f"{self.program.said()}\n--- {UNIT}\n{daemon}"


@contextlib.contextmanager
def systemd(w: World, place: Path) -> Iterator[Systemd]:
    """Run it at the destination; all that runs under it ends with it."""
    units = place / "units"
    units.mkdir()
    log = place / "serve.log"
    write_units(units, log)
    groups = place / "cgroup"
    groups.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", groups], check=True)
    group = groups / "systemd"
    group.mkdir()
    script = f"echo $$ > {group}/cgroup.procs; exec unshare --cgroup --pid --mount --ipc --fork "
    script += '--kill-child --mount-proc bash -c "$1" bash "$2"'
    program = w.start(w.destination, "bash", "-c", script, "bash", SCRIPT, str(units))
    pid = program.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        # The script becomes unshare, and its one child systemd.
        (first,) = eventually(
            lambda: children.read_text().split() if program.process.poll() is None else [""],
            why=program.said(),
        )
        assert first, program.said()
        manager = Systemd(program, int(first), log)

        def up() -> bool:
            assert program.process.poll() is None, program.said()
            argv = manager.inside("systemctl", "is-system-running")
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            return done.stdout.strip() in ("running", "degraded")

        eventually(up, why=program.said())
        yield manager
    finally:
        program.end()
        events = group / "cgroup.events"
        eventually(lambda: "populated 0" in events.read_text(), why="it does not end")
        # All mounts of it show the same groups.
        for left in sorted([group, *group.rglob("*/")], reverse=True):
            left.rmdir()
        subprocess.run(["umount", groups], check=True)


def hardened(status_file: str) -> None:
    """The process has what the unit leaves it, and no more."""
    status = dict(line.split(":\t", 1) for line in status_file.splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", status
    assert int(status["CapBnd"], 16) == int(status["CapEff"], 16) == 0, status
    assert status["Uid"].split()[0] == str(pwd.getpwnam("umem").pw_uid)


@pytest.mark.timeout(1200)
def test_a_daemon_that_hangs_or_dies_is_brought_back(tmp_path: Path) -> None:
    spec = replace(SPEC, accel="tcg")
    with contextlib.ExitStack() as stack:
        stack.enter_context(installed(mounted=False))
        # pytest's own is closed to other users.
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        place.chmod(0o755)
        w = stack.enter_context(world(tmp_path))
        w.destination.runtime = runtime.OF_HOST
        manager = stack.enter_context(systemd(w, place))
        stack.callback(lambda: print(manager.said()))
        manager.run("systemctl", "start", "umem.socket")
        assert manager.show("MainPID") == 0, "nobody has come yet"
        _, before = w.guest(spec)
        before.wait("tick", timeout=PATIENCE)

        serial = place / "runner"
        serial.mkdir()
        os.chown(serial, pwd.getpwnam(RUNNER).pw_uid, -1)
        qemu = w.start(
            w.destination,
            *manager.inside(*as_user(RUNNER)),
            *(LAUNCHER, os.environ["UMEM_QEMU"], "-name", "vm1"),
            *spec.qemu_args(serial / "serial"),
            *("-postcopy", "-incoming", f"tcp:0:{PORT}"),
        )
        after = w.console(serial / "serial")
        eventually(
            lambda: qemu.process.poll() is not None or "vm1" in manager.said(), why=qemu.said()
        )
        eventually(lambda: w.vm().get("state") == "waiting" or qemu.process.poll() is not None)
        assert qemu.process.poll() is None, qemu.said() + manager.said()
        assert w.vm()["areas"][0]["path"] == "/run/umem/areas/vm1.ram0", "its mount unit ran"
        hardened(manager.run("cat", f"/proc/{manager.show('MainPID')}/status"))

        migrate = w.migrate("--json", "--max-bandwidth", "500K")
        migrate.wait_said("runs at", 2 * PATIENCE)
        alive(after)
        manager.kill(signal.SIGSTOP)  # nothing but the watchdog ends it
        eventually(lambda: manager.show("NRestarts") == 1, why=manager.said())
        alive(after)
        manager.kill(signal.SIGKILL)
        eventually(lambda: manager.show("NRestarts") == 2, why=manager.said())
        alive(after)
        background = ("umemctl", "background", "vm1", "--max-bandwidth", "none")
        eventually(lambda: w.start(w.source, *background).wait() == 0, why=migrate.said())
        assert migrate.wait(2 * PATIENCE) == 0, migrate.said()
        verdict = after.verdict(PATIENCE)
        assert verdict.ok and verdict.bad == 0, verdict.text
        assert manager.show("NRestarts") == 2
