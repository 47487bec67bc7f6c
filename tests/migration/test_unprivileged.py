# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as systemd/ has it, without systemd, which takes its time to start
(tests/shapes/test_systemd.py): user umem, started by the first connection, without privileges; QEMU
is run by another user of group kvm.
"""

import contextlib
import grp
import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyumem import runtime, uapi
from tests.migration.test_whole import SPEC
from tests.migration.world import LAUNCHER, PATIENCE, PORT, alive, eventually, report_of, world

SYSTEMD = Path(__file__).parents[2] / "systemd"
RUNNER = "vmrunner"
"""Who runs QEMU."""
USERS = {"umem": 60108, RUNNER: 60109}


def command(*argv: str) -> None:
    subprocess.run(argv, check=True)


def as_user(name: str) -> tuple[str, ...]:
    """Return what stands before a command, as setpriv(1) takes it: no privilege, for good."""
    user, kvm = pwd.getpwnam(name), grp.getgrnam("kvm")
    return (
        *("setpriv", f"--reuid={user.pw_uid}", f"--regid={kvm.gr_gid}", "--clear-groups"),
        *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"),
    )


@contextlib.contextmanager
def installed(*, mounted: bool = True) -> Iterator[None]:
    """Have users, runtime directory and permissions as the packaging makes them, and areas as files
    unless something else mounts them.
    """
    # systemd-sysusers cannot: the test machine has a mount on /etc/shadow.
    with Path("/etc/passwd").open("a") as users:
        for name, uid in USERS.items():
            if name not in [user.pw_name for user in pwd.getpwall()]:
                users.write(f"{name}:x:{uid}:{uid}::/nonexistent:/usr/sbin/nologin\n")
    # A daemon of root's that was here before has left a directory of its own.
    subprocess.run(["umount", "/run/umem/areas"], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(runtime.OF_HOST, ignore_errors=True)
    command("systemd-tmpfiles", "--create", str(SYSTEMD / "umem.tmpfiles.conf"))
    kvm = grp.getgrnam("kvm").gr_gid
    for node in (uapi.DEVICE, "/dev/kvm"):  # 60-umem.rules, and the distribution's own
        os.chown(node, 0, kvm)
        Path(node).chmod(0o660)
    (runtime.OF_HOST / "areas").mkdir()
    if mounted:
        command("mount", "-t", "umem", "umem", "/run/umem/areas")
    try:
        yield
    finally:
        if mounted:
            command("umount", "/run/umem/areas")
        shutil.rmtree(runtime.OF_HOST)
        os.chown(uapi.DEVICE, 0, 0)


@pytest.mark.one_kernel
@pytest.mark.timeout(600)
def test_a_guest_comes_to_a_daemon_without_privileges(tmp_path: Path) -> None:
    spec = replace(SPEC, workload="idle")
    with contextlib.ExitStack() as stack:
        stack.enter_context(installed())
        # pytest's own is closed to other users.
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        place.chmod(0o755)
        w = stack.enter_context(world(tmp_path))
        w.destination.runtime = runtime.OF_HOST
        sock = runtime.OF_HOST / "serve.sock"
        # umem.socket and umem.service
        serve = w.start(
            w.destination,
            *("systemd-socket-activate", "--listen", str(sock)),
            *("--setenv=PYTHONPATH", "--setenv=UMEM_INSECURE"),
            *(*as_user("umem"), "umemctl", "serve", "--verbose"),
        )
        eventually(sock.exists)
        os.chown(sock, pwd.getpwnam("umem").pw_uid, grp.getgrnam("kvm").gr_gid)
        sock.chmod(0o660)
        _, _ = w.guest(spec)
        assert "ready on" not in serve.said()

        serial = place / "runner"
        serial.mkdir()
        os.chown(serial, pwd.getpwnam(RUNNER).pw_uid, -1)
        qemu = w.start(
            w.destination,
            *as_user(RUNNER),
            *(LAUNCHER, os.environ["UMEM_QEMU"], "-name", "vm1"),
            *spec.qemu_args(serial / "serial"),
            *("-postcopy", "-incoming", f"tcp:0:{PORT}"),
        )
        serve.wait_said("is another user's")
        after = w.console(serial / "serial")
        eventually(lambda: w.vm().get("state") == "waiting" or qemu.process.poll() is not None)
        assert qemu.process.poll() is None, qemu.said()
        assert w.vm()["areas"][0]["path"] == "/run/umem/areas/vm1.ram0"

        # Who runs VMs has what he needs, and nothing of another's VM.
        checked = w.destination.run([*as_user(RUNNER), "umemctl", "check", "--json"])
        found = {one["what"]: one for one in json.loads(checked.stdout)["checks"]}
        for what in ("driver", "kvm", "runtime directory", "area files", "daemon"):
            assert found[what]["level"] == "ok", found[what]
        denied = w.destination.run(
            [*as_user("nobody"), "ls", str(runtime.vm_dir("vm1"))],
        )
        assert denied.returncode and "Permission denied" in denied.stderr

        migrate = w.migrate("--json")
        assert migrate.wait(300) == 0, migrate.said()
        assert report_of(migrate)["state"] == "completed"
        alive(after)
        verdict = after.verdict(PATIENCE)
        assert verdict.ok, verdict.text
        (area,) = w.areas()
        assert area.complete and not area.mapped
        qemu.end()
        eventually(lambda: w.areas() == [], why="the area outlives its QEMU")

        # A VM that does not come: the daemon may not end that QEMU, umem-qemu does.
        qemu = w.start(
            w.destination,
            *as_user(RUNNER),
            *(LAUNCHER, os.environ["UMEM_QEMU"], "-name", "vm2"),
            *spec.qemu_args(serial / "serial2"),
            *("-postcopy", "-incoming", f"tcp:0:{PORT}"),
        )
        eventually(lambda: w.vm("vm2").get("state") == "waiting")
        serve.process.terminate()
        assert serve.wait() == 0, serve.said()
        assert qemu.wait() == 1 and "did not arrive" in qemu.said(), qemu.said()
        assert sock.exists(), "it is not the daemon's"
