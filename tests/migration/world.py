# SPDX-License-Identifier: GPL-2.0-or-later
"""A source with a running guest, a destination with a daemon, and the commands between them."""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyumem import uapi
from pyumem.control import ControlClient
from pyumem.errors import ControlError
from pyumem.qemu import Qemu
from pyumem.uapi import AreaInfo
from tests import certificates
from tests.vm.guest import GuestConsole, GuestSpec
from tests.vm.hosts import Host, Link, two_hosts

LAUNCHER = str(Path(__file__).parents[2] / "qemu-hooks" / "umem-qemu")
PORT = 4444
# The machine is emulated, perhaps busy: what takes a second elsewhere takes many here.
PATIENCE = 200.0


T = TypeVar("T")


def eventually(what: Callable[[], T], seconds: float = PATIENCE, why: str = "") -> T:
    """Return the first result that is true.  AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, why or "it did not happen"
        time.sleep(0.1)
    return result


@dataclass
class Program:
    """A program on a host, with everything that it says in one file."""

    process: "subprocess.Popen[Any]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_said(self, text: str, seconds: float = PATIENCE) -> None:
        why = f"{text!r} was not said: {self.said()[-2000:]}"
        eventually(lambda: text in self.said() or self.process.poll() is not None, seconds, why)
        assert text in self.said(), f"ended without saying {text!r}: {self.said()[-2000:]}"

    def wait(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end: {self.said()[-2000:]}") from None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class World:
    """Both hosts.  Every program started through it is ended with it."""

    def __init__(
        self,
        source: Host,
        destination: Host,
        tmp: Path,
        stack: contextlib.ExitStack,
        tls: Path | None = None,
    ) -> None:
        self.source = source
        self.destination = destination
        self.tmp = tmp
        self.stack = stack
        self._count = 0
        self._consoles: dict[str, GuestConsole] = {}
        source.extra_env["UMEM_RAM_DIR"] = "/dev/shm/umem-src"
        # Both hosts have one driver, which knows an area by its name: one of them has files.
        source.extra_env["UMEM_RAM"] = "file"
        for host in (source, destination):
            host.extra_env |= {"UMEM_TLS_CREDS": str(tls)} if tls else {"UMEM_INSECURE": "1"}
        self.destination_uri = f"tcp:{destination.address}:{PORT}"

    def start(self, host: Host, *argv: str) -> Program:
        self._count += 1
        log = self.tmp / f"{self._count:02}-{host.name}-{Path(argv[0]).name}.log"
        with log.open("w") as file:
            process = host.popen(argv, stdout=file, stderr=subprocess.STDOUT)
        program = Program(process, log)
        self.stack.callback(program.end)
        return program

    def console(self, serial: Path) -> GuestConsole:
        console = self._consoles[serial.name] = GuestConsole(serial)
        return self.stack.enter_context(console)

    def told(self) -> str:
        """Return what every program and every guest said: of one that died, its last words."""
        lines = []
        for log in sorted(self.tmp.glob("*.log")):
            lines += [f"--- {log.name}", log.read_text(errors="replace")[-3000:]]
        for name, console in self._consoles.items():
            lines += [f"--- {name}", *console.other_lines[-100:]]
        return "\n".join(lines)

    # --- the three programs of a migration ---

    def serve(self, *arguments: str) -> Program:
        serve = self.start(self.destination, "umemctl", "serve", *arguments)
        serve.wait_said("ready on")
        return serve

    def guest(
        self,
        spec: GuestSpec,
        name: str = "vm1",
        qemu: str = "UMEM_QEMU",
        arguments: tuple[str, ...] = (),
    ) -> tuple[Program, GuestConsole]:
        """Start the guest on the source; returns when its workload runs."""
        serial = self.tmp / f"{name}-source.serial"
        program = self.start(
            self.source,
            *(LAUNCHER, os.environ[qemu], "-name", name, *spec.qemu_args(serial), *arguments),
        )
        console = self.console(serial)
        console.wait("ready", timeout=4 * PATIENCE)  # tcg within tcg
        return program, console

    def expect(
        self,
        spec: GuestSpec,
        name: str = "vm1",
        qemu: str = "UMEM_QEMU",
        arguments: tuple[str, ...] = (),
        port: int = PORT,
    ) -> tuple[Program, GuestConsole]:
        """Start the QEMU that waits for the guest; returns when it does."""
        self._count += 1
        serial = self.tmp / f"{name}-{self._count}.serial"
        program = self.start(
            self.destination,
            *(LAUNCHER, os.environ[qemu], "-name", name, *spec.qemu_args(serial)),
            *("-postcopy", "-incoming", f"tcp:0:{port}", *arguments),
        )

        def waiting() -> bool:
            assert program.process.poll() is None, program.said()
            return self.vm(name).get("state") == "waiting"

        eventually(waiting, why=f"{name} does not wait: {program.said()}")
        return program, self.console(serial)

    def guest_refused(self, spec: GuestSpec, name: str = "vm1") -> str:
        """Try to start a guest that umem-qemu has to refuse; return what it says."""
        program = self.start(
            self.source,
            *(LAUNCHER, os.environ["UMEM_QEMU"], "-name", name),
            *spec.qemu_args(self.tmp / "refused.serial"),
        )
        assert program.wait() != 0
        return program.said()

    def migrate(self, *arguments: str, vm: str = "vm1", port: int = PORT) -> Program:
        uri = f"tcp:{self.destination.address}:{port}"
        return self.start(self.source, *("umemctl", "migrate", "-p", uri, "--vm", vm, *arguments))

    # --- looking ---

    # Straight from the sockets and the driver: starting umemctl takes seconds here.

    def serve_status(self) -> dict[str, Any]:
        with ControlClient(self.destination.runtime / "serve.sock", timeout=PATIENCE) as client:
            return client.ask("status")

    def migrate_status(self, vm: str = "vm1") -> dict[str, Any]:
        """What a running `umemctl migrate` says, {} when it does not answer yet."""
        try:
            path = self.source.runtime / "migrate" / f"{vm}.sock"
            with ControlClient(path, timeout=PATIENCE) as client:
                return client.ask("status")
        except ControlError:
            return {}

    def vm(self, name: str = "vm1") -> dict[str, Any]:
        """What serve says of a VM that it expects, {} when it expects none of that name."""
        vms = self.serve_status()["vms"]
        return next((vm for vm in vms if vm["name"] == name), {})

    def areas(self) -> list[AreaInfo]:
        control = uapi.open_control()
        try:
            return uapi.list_areas(control)
        finally:
            os.close(control)


WORLDS: list[World] = []
"""Those that are open now: who reports a failed test asks them."""


@contextlib.contextmanager
def watched(both: World) -> Iterator[World]:
    """Have a failure within the block show what every program said, before it is all gone."""
    WORLDS.append(both)
    try:
        yield both
    except BaseException:
        print(both.told())
        raise
    finally:
        WORLDS.remove(both)


@contextlib.contextmanager
def world(
    tmp: Path, link: Link | None = None, *, tls: bool = False, more_names: tuple[str, ...] = ()
) -> Iterator[World]:
    """Both hosts, with nothing running; under TLS, with certificates for the destination's address
    and for more names, or in clear.
    """
    with two_hosts(link) as (source, destination), contextlib.ExitStack() as stack:
        names = (destination.address, *more_names)
        directory = certificates.make(tmp / "tls", *names) if tls else None
        with watched(World(source, destination, tmp, stack, directory)) as both:
            yield both


def report_of(migrate: Program) -> dict[str, Any]:
    """The report of `umemctl migrate --json`, which is the last thing it says."""
    text = migrate.said()
    told = json.loads(text[text.index("\n{\n") :] if not text.startswith("{") else text)
    assert isinstance(told, dict)
    return told


def ask_qemu(path: Path, command: str, **arguments: object) -> Any:  # noqa: ANN401 - QMP's own
    """Execute a command at a QMP socket that nobody else uses."""

    async def once() -> object:
        qemu = await Qemu.connect_when_there(path, PATIENCE)
        try:
            return await qemu.execute(command, **arguments)
        finally:
            await qemu.close()

    return asyncio.run(once())


def alive(console: GuestConsole, seconds: float = PATIENCE) -> None:
    """The guest goes on: it says something new."""
    console.wait("tick", timeout=seconds, since=console.mark())
