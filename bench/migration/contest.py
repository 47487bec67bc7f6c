# SPDX-License-Identifier: GPL-2.0-or-later
"""One migration of one contender, measured.  Runs inside the test machine.

baseline      the guest works undisturbed
command       t = 0
STOP          QEMU's event at the source
RESUME        QEMU's event at the destination
resident      every page is at the destination
after         two seconds more, then the guest's verdict
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu.qmp import QMPError

from bench.migration.autopsy import autopsy
from bench.migration.monitor import Monitor
from bench.migration.plan import Contender, limit_s
from bench.migration.results import Limit, Sample, Setting
from bench.migration.usage import Usage
from tests.migration.world import PORT, Program, World, report_of
from tests.vm.guest import GuestConsole, GuestError, GuestSpec
from tests.vm.hosts import Host, Link, two_hosts

BASELINE_S = 3.0
AFTER_S = 2.0
BEAT_S = 0.01
"""Between two beats of the guest: bench/migration/guest/load.c."""
_GUEST_S = {"kvm": 60.0, "tcg": 240.0}
"""What a guest may take for an answer; one that stands still costs the run no more."""
_GUESTS = 2
_REQUESTS, _STREAM_MIB = 400, 32
_UNLIMITED = 1 << 40
_DOWNTIME_MS = 300
NOT_OVER = "not over in the time it had"
"""Of pre-copy: it does not converge."""


def spec_of(setting: Setting, more: tuple[str, ...] = ()) -> GuestSpec:
    """Return the guest of a setting."""
    # QEMU 10 cannot load the nested state of an emulated AMD processor; the guest needs none.
    cpu = "host,-svm" if setting.accel == "kvm" else "max"
    if not setting.async_pf:
        cpu += ",-kvm-asyncpf,-kvm-asyncpf-int"
    return GuestSpec(
        workload=setting.workload,
        writers=setting.vcpus,
        mb=setting.working_set_mib,
        memory=f"{setting.memory_mib}M",
        vcpus=setting.vcpus,
        accel=setting.accel,
        extra=("-cpu", cpu, *more),
    )


@dataclass
class Pair:
    """The guest on both sides."""

    source: Program
    before: GuestConsole
    at_source: Monitor
    destination: Program
    after: GuestConsole
    at_destination: Monitor


@dataclass
class Found:
    """What one contender's own way tells, beside what is measured of all alike."""

    end: float
    """time.monotonic() when it was over, or given up."""
    error: str = ""
    resident_s: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """More of Sample's."""


class Contest:
    """Two hosts with a link and a daemon, for as many migrations as are wanted."""

    def __init__(self, link: Link, tmp: Path, stack: contextlib.ExitStack) -> None:
        """Use contest()."""
        self.source, self.destination = stack.enter_context(two_hosts(link))
        self._tmp = tmp
        self._count = 0
        self._world = World(self.source, self.destination, tmp, stack)
        # As whoever follows the README has it.
        self.source.extra_env["UMEM_RAM"] = "area"
        self._serve = self._world.serve()

    # --- the limit ---

    def limit(self) -> Limit:
        """Measure what the link can do."""
        program = str(Path(os.environ["UMEM_BUILD"]) / "bench-guest" / "rawtcp")
        with self.source.popen([program, "serve", self.source.address, "7000"]) as server:
            try:
                time.sleep(0.5)
                # The bulk of a migration goes from the source; so does the stream.
                words = [program, "ask", self.source.address, "7000"]
                done = self.destination.run(
                    [*words, str(_REQUESTS), str(_STREAM_MIB)], timeout=120, check=True
                )
            finally:
                server.kill()
        return Limit(**json.loads(done.stdout))

    # --- one migration ---

    def measure(self, setting: Setting, contender: Contender, number: int) -> Sample:
        """Boot the guest, move it, and say what came of it.  An error is part of the sample; a
        guest that is lost before says nothing of who was to move it, and another one is tried.
        """
        for _ in range(_GUESTS):
            if (sample := self._measure(setting, contender, number)) is not None:
                return sample
        why = f"{_GUESTS} guests were lost before they were moved"
        return Sample(setting.name, contender.name, number, error=why)

    def _measure(self, setting: Setting, contender: Contender, number: int) -> Sample | None:
        """Do it once.  None: the guest was lost before it was moved."""
        self._count += 1
        ready = False
        folder = self._tmp / str(self._count)
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            world = World(self.source, self.destination, folder, stack)
            self.source.extra_env["UMEM_RAM"] = "area"
            try:
                with self._pair(world, setting, contender, stack) as pair:
                    pair.before.wait("step", timeout=_GUEST_S[setting.accel])
                    time.sleep(BASELINE_S)
                    since = pair.before.mark()
                    time.sleep(0.5)
                    pair.before.wait("step", timeout=1.0, since=since)
                    ready = True
                    try:
                        return self._move(world, pair, setting, contender, number)
                    except GuestError:
                        print(
                            autopsy(pair.destination.process.pid, pair.at_destination),
                            *world.areas(),
                            sep="\n",
                        )
                        raise
            except (GuestError, AssertionError, OSError, QMPError, TimeoutError) as e:
                print(world.told(), e, sep="\n", flush=True)
                if not ready:
                    return None
                why = f"{type(e).__name__}: {e}"[:300]
                return Sample(setting.name, contender.name, number, error=why)

    @contextlib.contextmanager
    def _pair(
        self, world: World, setting: Setting, contender: Contender, stack: contextlib.ExitStack
    ) -> Iterator[Pair]:
        sockets = [world.tmp / f"{side}.qmp" for side in ("source", "destination")]
        one, other = (
            spec_of(setting, ("-qmp", f"unix:{path},server=on,wait=off")) for path in sockets
        )
        if contender.umem is None:
            source, before = self._plain(world, self.source, one)
            before.wait("ready", timeout=one.boot_timeout)
            incoming = ("-incoming", "defer")
            destination, after = self._plain(world, self.destination, other, incoming)
        else:
            source, before = world.guest(one, name="leaver", qemu="UMEM_QEMU10")
            destination, after = world.expect(
                other, name="vm1", qemu="UMEM_QEMU10", arguments=contender.incoming
            )
        monitors = [stack.enter_context(Monitor(path)) for path in sockets]
        yield Pair(source, before, monitors[0], destination, after, monitors[1])
        for program in (source, destination):
            program.end()

    def _plain(
        self, world: World, host: Host, spec: GuestSpec, more: tuple[str, ...] = ()
    ) -> tuple[Program, GuestConsole]:
        serial = world.tmp / f"{host.name}.serial"
        words = (os.environ["UMEM_QEMU10"], *spec.qemu_args(serial), *more)
        return world.start(host, *words), world.console(serial)

    def _move(
        self, world: World, pair: Pair, setting: Setting, contender: Contender, number: int
    ) -> Sample:
        before = pair.before
        wire = self.source.tx_bytes() + self.destination.tx_bytes()
        pids = {
            "source qemu": pair.source.process.pid,
            "destination qemu": pair.destination.process.pid,
        }
        deadline = time.monotonic() + limit_s(setting)
        begun = time.monotonic()
        if contender.umem is None:
            with Usage(pids) as usage:
                found = self._qemu(pair, contender, deadline)
        else:
            words = ("umemctl", "migrate", *contender.umem, world.destination_uri)
            migrate = world.start(self.source, *words, "--vm", "leaver", "--json")
            pids |= {
                "umemctl migrate": migrate.process.pid,
                "umemctl serve": self._serve.process.pid,
            }
            with Usage(pids) as usage:
                found = self._umem(world, pair, migrate, contender, deadline)
        wire = self.source.tx_bytes() + self.destination.tx_bytes() - wire
        time.sleep(AFTER_S)
        stop, resume = pair.at_source.when("STOP"), pair.at_destination.when("RESUME")
        moved = not found.error
        # Who is not over in time after the switch runs at the destination all the same.
        verdict = (before if resume is None else pair.after).verdict(_GUEST_S[setting.accel])
        rate, lost, timeline = work(pair, begun, found.end)
        return Sample(
            setting.name,
            contender.name,
            number,
            error=found.error,
            downtime_ms=round(1000 * (resume - stop), 1) if stop and resume and moved else None,
            silence_ms=silence_ms(pair, begun, found.end) if moved else None,
            total_s=round(found.end - begun, 3) if moved else None,
            resident_s=found.resident_s if moved else None,
            source_free_s=round(stop - begun, 3) if stop and moved else None,
            baseline_per_s=rate,
            work_lost_s=lost,
            compute_share=share(pair, rate, found.end)
            if setting.workload == "compute" and moved
            else None,
            wire_mib=round(wire / (1 << 20), 2),
            verdict_ok=verdict.ok,
            processes=usage.processes(),
            timeline=timeline,
            switch_t_s=round(stop - begun, 3) if stop else None,
            end_t_s=round(found.end - begun, 3),
            **found.values,
        )

    # --- QEMU's own ---

    def _qemu(self, pair: Pair, contender: Contender, deadline: float) -> Found:
        parameters = {"max-bandwidth": _UNLIMITED, "downtime-limit": _DOWNTIME_MS}
        capabilities = [
            {"capability": name, "state": True} for name in ("events", *contender.capabilities)
        ]
        uri = f"tcp:{self.destination.address}:{PORT}"
        for monitor in (pair.at_source, pair.at_destination):
            monitor.execute("migrate-set-capabilities", capabilities=capabilities)
            monitor.execute("migrate-set-parameters", **parameters)
        pair.at_destination.execute("migrate-incoming", uri=uri)
        source = pair.at_source
        source.execute("migrate", uri=uri)
        switched = False
        while contender.switch_after is not None and not switched:
            told = source.execute("query-migrate")
            passes = told.get("ram", {}).get("dirty-sync-count", 0)
            if told.get("status") == "active" and passes > contender.switch_after:
                source.execute("migrate-start-postcopy")
                switched = True
            elif told.get("status") in ("device", "completed"):
                break  # it had converged before
            elif told.get("status") not in ("setup", "active") or time.monotonic() > deadline:
                return Found(time.monotonic(), f"QEMU: {told.get('status')} before the switch")
            time.sleep(0.01)
        left = max(0.0, deadline - time.monotonic())
        try:
            end = source.wait("MIGRATION", left, status="completed")
        except TimeoutError:
            now = time.monotonic()
            told = source.execute("query-migrate")
            if told.get("status") == "failed":
                return Found(now, f"QEMU: failed: {told.get('error-desc', 'it says no more')}")
            if source.when("STOP") is None:
                source.execute("migrate_cancel")
            return Found(now, NOT_OVER)
        # A post-copy is over for the source a moment before the destination says so.
        end = max(end, pair.at_destination.wait("MIGRATION", 30, status="completed"))
        values: dict[str, Any] = {}
        if switched:
            told = pair.at_destination.execute("query-migrate")
            values["blocked_ms"] = float(sum(told.get("postcopy-vcpu-blocktime", [])))
        stop = source.when("STOP")
        assert stop is not None
        resident = end - stop if switched else 0.0
        return Found(end, resident_s=round(resident, 3), values=values)

    # --- ours ---

    def _umem(
        self,
        world: World,
        pair: Pair,
        migrate: Program,
        contender: Contender,
        deadline: float,
    ) -> Found:
        if contender.on_demand_s:
            pair.at_destination.wait("RESUME", max(0.0, deadline - time.monotonic()))
            time.sleep(contender.on_demand_s)
            done = self.source.run(["umemctl", "background", "leaver"])
            if done.returncode:
                return Found(time.monotonic(), done.stderr.strip())
        try:
            status = migrate.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            migrate.process.send_signal(2)
            migrate.wait(60)
            return Found(time.monotonic(), NOT_OVER)
        end = time.monotonic()
        if status:
            return Found(end, (report_of(migrate).get("error") or migrate.said())[-200:])
        told = report_of(migrate)
        values = {
            "downtime_parts_ms": told["downtime_parts_ms"],
            "blocked_ms": told["blocked_ms"],
            "demand_p50_us": told["demand_latency_p50_us"],
            "demand_p99_us": told["demand_latency_p99_us"],
            "demand_pages": told["pages_demand"],
            "latency_histogram": self._histogram(world),
        }
        resident_s = told["time_to_resident_s"]
        if resident_s and "-p" in (contender.umem or ()) and not contender.on_demand_s:
            content = told["pages_background"] * told["page_size_bytes"]
            values["background_mib_s"] = round(content / resident_s / (1 << 20), 2)
        return Found(end, resident_s=resident_s, values=values)

    def _histogram(self, world: World) -> list[tuple[float, int]]:
        """Of the destination's report of the last migration."""
        paths = sorted((world.destination.runtime / "reports").glob("*-desti*-vm1.json"))
        if not paths:
            return []
        told = json.loads(paths[-1].read_text())["demand_latency_histogram"]
        # The last bucket of all has no bound.
        return [(float(one["up_to_us"] or "inf"), int(one["requests"])) for one in told]


@contextlib.contextmanager
def contest(setting: Setting) -> Iterator[Contest]:
    """Set the scene for a setting's link."""
    with tempfile.TemporaryDirectory() as tmp, contextlib.ExitStack() as stack:
        yield Contest(Link(rate=setting.rate, delay=setting.delay), Path(tmp), stack)


# --- what the guest's lines say ---


def steps(*consoles: GuestConsole) -> list[tuple[float, int]]:
    """Return (time.monotonic(), work so far) of every step, of both sides."""
    found = [
        (message.time, int(message.fields["work"]))
        for console in consoles
        for message in list(console.messages)
        if message.kind == "step"
    ]
    return sorted(found)


def at(points: list[tuple[float, int]], when: float) -> float:
    """Return the work done by then, between two steps in proportion.

    A guest that stands still has no step in between: what it did before it stopped is spread over
    the gap, an error of a step's work at most at either end.
    """
    last = points[0]
    for point in points:
        if point[0] >= when:
            span = point[0] - last[0]
            if span <= 0:
                return float(point[1])
            return last[1] + (point[1] - last[1]) * (when - last[0]) / span
        last = point
    return float(last[1])


def work(
    pair: Pair, begun: float, end: float
) -> tuple[float | None, float | None, list[tuple[float, float]]]:
    """Return (undisturbed work per s, seconds of it lost, timeline): None where none is done."""
    points = steps(pair.before, pair.after)
    if len(points) < 2:
        return None, None, []
    rate = (at(points, begun) - at(points, begun - BASELINE_S)) / BASELINE_S
    timeline = [
        (round(after[0] - begun, 3), round((after[1] - one[1]) / (after[0] - one[0]), 1))
        for one, after in itertools.pairwise(points)
        if after[0] > one[0] and begun - BASELINE_S <= after[0] <= end + AFTER_S
    ]
    if rate <= 0:
        return None, None, timeline
    until = min(end + AFTER_S, points[-1][0])
    lost = (until - begun) - (at(points, until) - at(points, begun)) / rate
    return round(rate, 1), round(lost, 3), timeline


def share(pair: Pair, rate: float | None, end: float) -> float | None:
    """Return the speed from the switch to the end, against the undisturbed one."""
    points = [point for point in steps(pair.after) if point[0] <= end + BEAT_S]
    if not rate or len(points) < 4:
        return None
    (first_s, first), (last_s, last) = points[0], points[-1]
    return round((last - first) / (last_s - first_s) / rate, 3)


def silence_ms(pair: Pair, begun: float, end: float) -> float:
    """Return the longest time between two beats, less the one that lies between any two."""
    times = sorted(
        message.time
        for console in (pair.before, pair.after)
        for message in list(console.messages)
        if message.kind == "beat" and begun <= message.time <= end + AFTER_S
    )
    longest = max((b - a for a, b in itertools.pairwise(times)), default=end - begun)
    return round(1000 * max(0.0, longest - BEAT_S), 1)
