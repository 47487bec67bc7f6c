# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl top, asking sockets that answer like serve and migrate."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyumem import runtime
from pyumem.cli import top
from pyumem.cli.main import main
from pyumem.control import Asker, ControlServer

COUNTS = {
    "pages_total": 1000,
    "pages_demand": 100,
    "pages_background": 300,
    "pages_zero": 100,
    "pages_uncounted": 0,
    "pages_done": 500,
    "bytes_moved": 1 << 20,
    "elapsed_s": 2.0,
}


class World:
    """Two daemons that have moved on whenever they are asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def _counts(self) -> dict[str, Any]:
        more = 50 * len(self.asked)
        counts: dict[str, Any] = {**COUNTS, "state": "postcopy-active", "session": "0"}
        for name in ("pages_background", "pages_done"):
            counts[name] += more
        return {**counts, "bytes_moved": counts["bytes_moved"] + 4096 * more}

    async def serve(self, question: dict[str, Any], _asker: Asker) -> dict[str, Any]:
        self.asked.append(question)
        migration = {
            **self._counts(),
            "peer": "[fd00::1]:40000",
            "faults_major": 10 * len(self.asked),
            "bytes_received_by_lane": {"control": 1024, "urgent-0": 2048},
            "demand_latency_p50_us": 300.0,
            "demand_latency_p99_us": 900.0,
        }
        vm = {
            "state": "postcopy-active",
            "migration": migration,
            "resident_map": "0159",
            "demand_latency_histogram": [
                {"up_to_us": 524.287, "requests": 8},
                {"up_to_us": 1048.575, "requests": 0},
                {"up_to_us": None, "requests": 1},
            ],
        }
        waiting = {"name": "vm0", "state": "waiting", "migration": None, "resident_map": "0000"}
        return {"pid": 1, "vms": [{"name": "vm1", **vm}, waiting]}

    async def migrate(self, _question: dict[str, Any], _asker: Asker) -> dict[str, Any]:
        return {
            "name": "vm2",
            "destination": "tcp:[fd00::2]:4444",
            **self._counts(),
            "requests": 7,
            "bytes_sent_by_lane": {"control": 0, "urgent-0": 0},
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        ready, loop = threading.Event(), asyncio.new_event_loop()
        end = asyncio.Event()

        async def live() -> None:
            runtime.make_private(runtime.migrate_dir())
            async with (
                ControlServer(runtime.serve_socket(), self.serve),
                ControlServer(runtime.migrate_dir() / "vm2.sock", self.migrate),
            ):
                ready.set()
                await end.wait()

        thread = threading.Thread(target=lambda: loop.run_until_complete(live()))
        thread.start()
        try:
            assert ready.wait(10)
            yield
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join(10)
            loop.close()


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(top, "_ONCE_S", 0.05)


def test_a_sample_for_programs() -> None:
    with World().running():
        result = CliRunner().invoke(main, ["top", "--json"])
    assert result.exit_code == 0, result.output
    vms = {one["vm"]: one for one in json.loads(result.stdout)["vms"]}
    here, waiting, leaving = vms["vm1"], vms["vm0"], vms["vm2"]
    assert here["side"] == "destination" and leaving["side"] == "source"
    assert here["pages_done"] == 600 and here["resident_map"] == "0159"
    # 50 pages and 10 faults came between two looks, a little more than 0.05 s apart.
    assert 0 < here["faults_per_s"] <= 200
    assert here["rate_bytes_s"] == pytest.approx(4096 * 5 * here["faults_per_s"], rel=0.2)
    assert here["eta_s"] == pytest.approx(400 / (5 * here["faults_per_s"]), rel=0.2, abs=0.1)
    assert leaving["faults_per_s"] == 0 and leaving["demand_latency_p50_us"] is None
    assert leaving["peer"] == "tcp:[fd00::2]:4444"
    assert waiting["state"] == "waiting" and waiting["pages_total"] == 0


def test_a_sample_for_people() -> None:
    world = World()
    with world.running():
        text = CliRunner().invoke(main, ["top", "--once"]).output
    for word in (
        "vm1: postcopy-active, from [fd00::1]:40000",
        "60.0 % of 1000 pages",
        "faults/s",
        "lanes: control 1.0 KiB, urgent-0 2.0 KiB",
        "latency p50 300 us, p99 900 us  0.52 ms |█ ▁| longer",
        "memory [·░▒█]",
        "vm0: waiting\n  memory [····]",
        "vm2: postcopy-active, to tcp:[fd00::2]:4444",
        "0 requests/s",
    ):
        assert word in text, (word, text)
    assert all(question["detail"] is True for question in world.asked)


def test_nothing_to_see() -> None:
    result = CliRunner().invoke(main, ["top", "--once"])
    assert result.exit_code == 0 and "nothing is expected" in result.output


def test_it_is_drawn_until_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = 0

    def sleep(_seconds: float) -> None:
        nonlocal slept
        slept += 1
        if slept == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    world = World()
    with world.running():
        assert CliRunner().invoke(main, ["top"]).exit_code == 0
    assert len(world.asked) == 3
