# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest, moved to and fro between two hosts, while something breaks each time.

What is broken, and when, comes from a seed.  After every move, or attempt at one, the guest checks
its memory; it runs in one place, nothing is left in the other, and no migration that was committed
is lost.  As a program: python -m tests.migration.chaos ROUNDS [SEED].
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.migration.world import PATIENCE, Program, World, alive, eventually
from tests.vm.guest import GuestConsole, GuestSpec
from tests.vm.hosts import Link, two_hosts

# TCG as in test_before_commit.py, and for the same reason.
SPEC = GuestSpec(workload="verify", writers=1, mb=16, memory="96M", accel="tcg")
FIRST_S, LAST_S = 0.5, 12.0
"""When something breaks, in seconds after `umemctl migrate` was started: from its setup to near the
end of the transfer."""


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


class Chaos:
    """The two hosts, the guest, and the dice."""

    def __init__(self, seed: int, tmp: Path, stack: contextlib.ExitStack) -> None:
        self.dice = random.Random(seed)
        one, other = stack.enter_context(two_hosts(Link(rate="1gbit", delay="0.2ms")))
        self.sides = []
        for source, destination in ((one, other), (other, one)):
            folder = tmp / destination.name
            folder.mkdir()
            world = World(source, destination, folder, stack)
            self.sides.append(Side(world, world.serve(), f"vm-{destination.name}"))
        # Where there are areas too, an ordinary file is only the beginning.
        self.qemu, self.console = self.sides[0].world.guest(SPEC, name=self.sides[1].vm)
        self.console.wait("tick", timeout=PATIENCE)
        self.at = 1
        """Which of the sides has the guest."""
        self.done = self.undone = 0

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
        time.sleep(self.dice.uniform(1, 16))
        host.link_up(True)

    def stop_serve(self, move: Move) -> None:
        self._pause(move.to.serve)

    def stop_migrate(self, move: Move) -> None:
        self._pause(move.migrate)

    def _pause(self, program: Program) -> None:
        with contextlib.suppress(ProcessLookupError):
            program.process.send_signal(signal.SIGSTOP)
            time.sleep(self.dice.uniform(1, 16))
            program.process.send_signal(signal.SIGCONT)

    def ctrl_c(self, move: Move) -> None:
        move.migrate.process.send_signal(signal.SIGINT)

    def lose_packets(self, move: Move) -> None:
        move.to.world.source.set_link(Link(loss="10%"))
        time.sleep(self.dice.uniform(1, 6))
        move.to.world.source.set_link(Link())

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
    )

    # --- one round ---

    def round(self) -> str:
        """Move the guest to the other side, or try to.  Returns what happened, in a line."""
        to, back = self.sides[1 - self.at], self.sides[self.at]
        new_qemu, console = to.world.expect(SPEC, name=to.vm)
        arguments = ["--background-lanes", str(self.dice.randint(1, 3)), "--json"]
        if self.dice.random() < 0.5:
            arguments += ["--prefetch-forward", "8"]
        move = Move(to, back, to.world.migrate(*arguments, vm=back.vm), new_qemu)
        begun = time.monotonic()
        for at in sorted(
            self.dice.uniform(FIRST_S, LAST_S) for _ in range(self.dice.randint(1, 3))
        ):
            time.sleep(max(0.0, begun + at - time.monotonic()))
            if move.migrate.process.poll() is not None:
                break
            fault = self.dice.choice(self.FAULTS)
            move.broken.append(f"{fault.__name__}@{at:.1f}")
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
        return f"{'moved' if moved else 'stayed'} after {took:.0f} s: {', '.join(move.broken)}"

    def _ends(self, move: Move) -> bool:
        """Wait for the end.  Tells whether the guest has moved."""
        while True:
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
                print(f"failed in round {number} of seed {seed}", flush=True)
                raise
    print(f"chaos: {scene.done} moved, {scene.undone} stayed, none was lost", flush=True)


if __name__ == "__main__":
    main()
