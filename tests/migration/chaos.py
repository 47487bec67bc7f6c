# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest, moved to and fro between two hosts, while something breaks each time.

What is broken, and when, comes from a seed.  After every move, or attempt at one, the guest checks
its memory; it runs in one place, nothing is left in the other, and no migration that was committed
is lost.  As a program: python -m tests.migration.chaos ROUNDS [SEED].
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyumem.control import ControlClient
from pyumem.errors import UmemError
from tests import certificates
from tests.migration.world import PATIENCE, Program, World, alive, eventually
from tests.vm.guest import GuestConsole, GuestSpec
from tests.vm.hosts import Link, two_hosts

# TCG as in test_before_commit.py, and for the same reason.
SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M", accel="tcg")
BEFORE_S = 8.0
"""When something breaks, at the latest: seconds after `umemctl migrate` was started ..."""
AFTER_S = 6.0
"""... or, two times out of three, after the commit."""
MODES: tuple[list[str], ...] = (["-p"], ["-p"], ["--hybrid"], ["-p", "--precopy-rounds", "2"], [])
BANDWIDTH = ("3M", "6M", "12M")
"""Of the background transfer: the guest's memory takes some seconds."""


@dataclass
class Side:
    """A host with what runs on it."""

    world: World
    """The world in which this host is the destination."""
    serve: Program
    vm: str
    """What the guest is called here: both hosts share a driver, which knows an area by its name."""


@dataclass
class Move:
    """One attempt to move the guest."""

    to: Side
    back: Side
    migrate: Program
    new_qemu: Program
    broken: list[str] = field(default_factory=list)

    @property
    def status(self) -> dict[str, Any]:
        return self.to.world.migrate_status(self.back.vm)

    @property
    def committed(self) -> bool:
        return str(self.status.get("state", "")).startswith("postcopy")

    def wait_committed(self) -> None:
        """Or for the end of the command."""
        eventually(
            lambda: self.committed or self.migrate.process.poll() is not None,
            why=f"neither committed nor given up: {self.migrate.said()[-2000:]}",
        )


class Chaos:
    """The two hosts, the guest, and the dice."""

    def __init__(self, seed: int, tmp: Path, stack: contextlib.ExitStack) -> None:
        self.dice = random.Random(seed)
        one, other = stack.enter_context(two_hosts(Link(rate="1gbit", delay="0.2ms")))
        names = (one.address, other.address)
        tls = certificates.make(tmp / "tls", *names) if self.dice.random() < 0.5 else None
        self.sides = []
        for source, destination in ((one, other), (other, one)):
            folder = tmp / destination.name
            folder.mkdir()
            world = World(source, destination, folder, stack, tls)
            self.sides.append(Side(world, world.serve(), f"vm-{destination.name}"))
        self.sides[0].world.source.extra_env["UMEM_RAM"] = "area"
        self.qemu, self.console = self.sides[0].world.guest(SPEC, name=self.sides[1].vm)
        self.console.wait("tick", timeout=PATIENCE)
        self.at = 1
        """Which of the sides has the guest."""
        self.done = self.undone = 0
        self.move: Move | None = None

    # --- what may break ---

    def kill_serve(self, move: Move) -> None:
        move.to.serve.process.kill()
        move.to.serve.process.wait()
        time.sleep(self.dice.uniform(0, 3))
        move.to.serve = move.to.world.serve()

    def kill_destination_worker(self, move: Move) -> None:
        migration = move.to.world.vm(move.to.vm).get("migration") or {}
        self._kill_one_of(migration.get("workers", []))

    def kill_source_worker(self, move: Move) -> None:
        self._kill_one_of(move.status.get("workers", []))

    def _kill_one_of(self, workers: list[dict[str, Any]]) -> None:
        pids = [int(worker["pid"]) for worker in workers if worker["pid"]]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.dice.choice(pids), signal.SIGKILL)

    def kill_migrate(self, move: Move) -> None:
        record = self._record(move)
        move.migrate.process.kill()
        move.migrate.process.wait()
        time.sleep(self.dice.uniform(0, 3))
        if record.exists():
            move.migrate = self._resume(move)

    def _record(self, move: Move) -> Path:
        return move.to.world.source.runtime / f"migrate/{move.back.vm}.json"

    def _resume(self, move: Move) -> Program:
        world = move.to.world
        return world.start(
            world.source, *("umemctl", "migrate", "--resume", "--vm", move.back.vm, "--json")
        )

    def cut_network(self, move: Move) -> None:
        host = self.dice.choice((move.to.world.source, move.to.world.destination))
        host.link_up(False)
        self._wait_while_broken()
        host.link_up(True)

    def _wait_while_broken(self) -> None:
        """For less than the heartbeat's patience, or for more."""
        time.sleep(self.dice.choice((self.dice.uniform(0.5, 3), self.dice.uniform(10, 13))))

    def stop_serve(self, move: Move) -> None:
        self._pause(move.to.serve)

    def stop_migrate(self, move: Move) -> None:
        self._pause(move.migrate)

    def _pause(self, program: Program) -> None:
        with contextlib.suppress(ProcessLookupError):
            program.process.send_signal(signal.SIGSTOP)
            self._wait_while_broken()
            program.process.send_signal(signal.SIGCONT)

    def ctrl_c(self, move: Move) -> None:
        move.migrate.process.send_signal(signal.SIGINT)

    def lose_packets(self, move: Move) -> None:
        move.to.world.source.set_link(Link(loss="10%"))
        time.sleep(self.dice.uniform(1, 6))
        move.to.world.source.set_link(Link())

    def garbage(self, move: Move) -> None:
        """Many a stranger at the port, one after the other and all at once."""
        host, port = move.to.world.destination_uri.split(":")[1:]
        talk = f"head -c $((RANDOM % 3000)) /dev/urandom > /dev/tcp/{host}/{port}"
        calls = f"for i in $(seq 10); do {talk}; ({talk}; sleep 2) & done; wait"
        move.to.world.source.run(["timeout", "20", "bash", "-c", calls])

    def rmmod(self, _move: Move) -> None:
        done = subprocess.run(["rmmod", "umem"], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and "in use" in done.stderr, done.stderr

    def kill_old_qemu(self, move: Move) -> None:
        """The source's, once it has no right to run any more; its memory is where it was."""
        if "ctrl_c" in " ".join(move.broken):
            return  # the command may be about to leave it
        # One that takes up again what another left needs seconds until it has it open.
        eventually(lambda: self._command_holds_ram(move) or move.migrate.process.poll() is not None)
        if move.migrate.process.poll() is not None:
            return
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            record = json.loads(self._record(move).read_text())
            if record["answered"]:
                os.kill(record["qemu"]["pid"], signal.SIGKILL)

    def _command_holds_ram(self, move: Move) -> bool:
        held = []
        for fd in Path(f"/proc/{move.migrate.process.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # closed meanwhile, or the process is gone
                held.append(str(fd.readlink()))
        return any(f"{move.back.vm}.ram0" in one for one in held)

    FAULTS: tuple[Callable[[Chaos, Move], None], ...] = (
        kill_serve,
        kill_destination_worker,
        kill_source_worker,
        kill_migrate,
        cut_network,
        stop_serve,
        stop_migrate,
        ctrl_c,
        lose_packets,
        garbage,
        rmmod,
        kill_old_qemu,
    )
    # RAM that is an area lives as long as somebody holds it: this command, or the old QEMU.
    LAST_HOLDER = (kill_migrate, ctrl_c)

    # --- one round ---

    def round(self) -> str:
        """Move the guest to the other side, or try to.  Returns what happened, in a line."""
        to, back = self.sides[1 - self.at], self.sides[self.at]
        new_qemu, console = to.world.expect(SPEC, name=to.vm)
        arguments = ["--lanes", str(self.dice.randint(1, 3)), "--json"]
        arguments += ["--max-bandwidth", self.dice.choice(BANDWIDTH)]
        mode = self.dice.choice(MODES)
        if mode and self.dice.random() < 0.3:
            arguments.append("-n")
        arguments += ["--compress", self.dice.choice(("auto", "on", "off"))]
        if self.dice.random() < 0.5:
            arguments += ["--prefetch-forward", "8"]
        argv = ["migrate", *mode, to.world.destination_uri, "--vm", back.vm, *arguments]
        self.move = move = Move(
            to, back, to.world.start(to.world.source, "umemctl", *argv), new_qemu
        )
        begun = time.monotonic()
        early = self.dice.random() < 1 / 3
        if not early:
            move.wait_committed()
        base, last_s = time.monotonic(), BEFORE_S if early else AFTER_S
        for at in sorted(self.dice.uniform(0, last_s) for _ in range(self.dice.randint(1, 3))):
            time.sleep(max(0.0, base + at - time.monotonic()))
            if move.migrate.process.poll() is not None:
                break
            fault = self.dice.choice(self.FAULTS)
            if fault in self.LAST_HOLDER and "kill_old_qemu" in " ".join(move.broken):
                continue
            move.broken.append(f"{fault.__name__}@{'' if early else 'commit+'}{at:.1f}")
            fault(self, move)
        moved = self._ends(move)
        self._look(move, console if moved else self.console)
        if moved:
            assert self.qemu.wait() == 0, self.qemu.said()
            self.qemu, self.console, self.at = new_qemu, console, 1 - self.at
            self.done += 1
        else:
            self.undone += 1
        took = time.monotonic() - begun
        how = " ".join(mode) or "pre-copy"
        return f"{how}: {'moved' if moved else 'stayed'} after {took:.0f} s: " + ", ".join(
            move.broken
        )

    def _let_background_run(self, move: Move) -> None:
        """What began with -n comes to its end only so."""
        path = move.to.world.source.runtime / "migrate" / f"{move.back.vm}.sock"

        def told() -> bool:
            if move.migrate.process.poll() is not None:
                return True
            try:
                with ControlClient(path, timeout=PATIENCE) as client:
                    client.ask("background", on=True)
                return True
            except UmemError as e:
                if "recover" in str(e):
                    with contextlib.suppress(UmemError), ControlClient(path) as client:
                        client.ask("recover")
                return False

        eventually(told, why=f"nobody hears: {move.migrate.said()[-2000:]}")

    def _ends(self, move: Move) -> bool:
        """Wait for the end.  Tells whether the guest has moved."""
        while True:
            self._let_background_run(move)
            status = move.migrate.wait(2 * PATIENCE)
            # A Ctrl-C while it was paused, or before Python had come to our first line.
            if status in (4, -signal.SIGINT) and self._record(move).exists():
                move.migrate = self._resume(move)
                continue
            if status == 0:
                return True
            killed = (-signal.SIGINT, -signal.SIGKILL)
            assert status in (1, 3, 130, *killed), f"{status}: {move.migrate.said()}"
            if move.to.world.vm(move.to.vm).get("state") == "waiting":
                move.new_qemu.end()  # the other never came to it
                return False
            assert move.new_qemu.wait() != 0, "the QEMU that waited in vain is still there"
            return False

    def _look(self, move: Move, console: GuestConsole) -> None:
        """The guest is well, in one place, and nothing is left in the other."""
        alive(console)
        verdict = console.verdict(PATIENCE)
        assert verdict.ok and verdict.bad == 0, f"{verdict.text}\n{move.migrate.said()}"
        for side in self.sides:
            runtime = side.world.destination.runtime
            eventually(
                lambda runtime=runtime: (
                    not list(runtime.glob("migrate/*.json"))  # type: ignore[misc]
                    and not list(runtime.glob("incoming/*.json"))
                ),
                why=f"a record is left in {runtime}",
            )
        # An area is the VM's RAM or nobody's.
        eventually(lambda: len(move.to.world.areas()) <= 1, why="an area is left")


@contextlib.contextmanager
def chaos(seed: int, tmp: Path) -> Iterator[Chaos]:
    """Set the scene."""
    with contextlib.ExitStack() as stack:
        yield Chaos(seed, tmp, stack)


def main() -> None:
    rounds = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    print(f"chaos: {rounds} rounds, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as tmp, chaos(seed, Path(tmp)) as scene:
        for number in range(1, rounds + 1):
            try:
                print(f"{number:4} {scene.round()}", flush=True)
            except BaseException:
                for side in scene.sides:
                    print(side.world.told())
                broken = scene.move.broken if scene.move else []
                print(f"failed in round {number} of seed {seed}: {broken}", flush=True)
                raise
    print(f"chaos: {scene.done} moved, {scene.undone} stayed, none was lost", flush=True)


if __name__ == "__main__":
    main()
