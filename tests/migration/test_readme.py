# SPDX-License-Identifier: GPL-2.0-or-later
"""The README's commands for real hosts, word for word: each block is given to a shell on its host.

What a reader has and the test machine lacks is laid out first: the name desthost, and a folder in
which kmod/umem.ko has been built and vmlinuz and initrd.img lie.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyumem import areafs
from tests.migration.world import PATIENCE, Program, World, eventually, world

CHECKOUT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- readme-test: ([a-z ]+) -->\n```sh\n(.*?)```", re.DOTALL)
TICK = re.compile(r"^UMEM-GUEST tick t_ms=(\d+)", re.MULTILINE)


def blocks() -> dict[str, str]:
    return dict(BLOCK.findall((CHECKOUT / "README.md").read_text()))


@contextlib.contextmanager
def name_of_destination(address: str, tmp: Path) -> Iterator[None]:
    """Let desthost mean the destination."""
    hosts = tmp / "hosts"
    hosts.write_text(f"{Path('/etc/hosts').read_text()}\n{address} desthost\n")
    subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "/etc/hosts"], check=True)


def folder(tmp: Path, name: str) -> Path:
    """What the README's reader has under his feet."""
    place = tmp / name
    (place / "kmod").mkdir(parents=True)
    module = Path(os.environ["UMEM_BUILD"]) / "kmod" / os.environ["UMEM_KERNEL"] / "umem.ko"
    (place / "kmod/umem.ko").symlink_to(module)
    (place / "vmlinuz").symlink_to(os.environ["UMEM_GUEST_KERNEL"])
    (place / "initrd.img").symlink_to(os.environ["UMEM_GUEST_INITRD"])
    return place


def end_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)


@contextlib.contextmanager
def no_certificates_left() -> Iterator[None]:
    """Without them, and with root alone able to read them, other tests find another machine."""
    try:
        yield
    finally:
        shutil.rmtree("/etc/pki/umem", ignore_errors=True)


def ticks(place: Path) -> list[int]:
    """The guest's clock, ms, as its console shows it each second."""
    log = place / "vm1.log"
    return [int(t) for t in TICK.findall(log.read_text())] if log.exists() else []


@pytest.mark.one_kernel
def test_its_commands_move_a_vm(tmp_path: Path) -> None:
    todo = blocks()
    assert set(todo) == {
        *("source vm", "source migrate"),
        *("destination daemon", "destination vm"),
        "certificates",
    }
    # Both hosts have the test machine's /etc, which lives as long as that.
    subprocess.run(["bash", "-ec", f"cd {CHECKOUT}\n{todo['certificates']}"], check=True)
    # A failed test before this one may have left a mount, which holds the module.
    subprocess.run(["umount", "-a", "-t", areafs.FILESYSTEM], check=True)
    subprocess.run(["rmmod", "umem"], check=True)
    places = {name: folder(tmp_path, name) for name in ("source", "destination")}

    with (
        no_certificates_left(),
        world(tmp_path) as w,
        name_of_destination(w.destination.address, tmp_path),
    ):
        for host in (w.source, w.destination):
            del host.extra_env["UMEM_INSECURE"]

        def type_in(what: str) -> Program:
            """Give a block to a shell on its host, a session that ends with the test."""
            host = {"source": w.source, "destination": w.destination}[what.split()[0]]
            script = f"set -e; cd {places[what.split()[0]]}\n{todo[what]}"
            shell = w.start(host, "setsid", "bash", "-c", script)
            w.stack.callback(end_session, shell.process.pid)
            return shell

        moves(w, type_in, places)


def moves(w: World, type_in: Callable[[str], Program], places: dict[str, Path]) -> None:
    type_in("source vm")
    eventually(lambda: ticks(places["source"]), 3 * PATIENCE, "the guest did not start")

    daemon = type_in("destination daemon")
    daemon.wait_said("ready on")
    type_in("destination vm")
    eventually(lambda: w.vm().get("state") == "waiting", why="no VM is expected")

    migrate = type_in("source migrate")
    assert migrate.wait(3 * PATIENCE) == 0, migrate.said()
    assert "completed" in migrate.said()
    last = ticks(places["source"])[-1]
    eventually(lambda: ticks(places["destination"]), why="the guest is silent at the destination")
    assert ticks(places["destination"])[0] > last, "the guest's clock went on"
