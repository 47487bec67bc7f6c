# SPDX-License-Identifier: GPL-2.0-or-later
"""Many things at once: threads on random pages, lanes that overlap, and everything that races.

UMEM_STRESS_SECONDS and UMEM_STRESS_SEED make the last test longer, or like one that failed; that
is what `make stress-driver SECONDS=600 SEED=...` sets.
"""

from __future__ import annotations

import os
import random
import re
import select
import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from pyumem import uapi
from pyumem.area import Area

from .build import program
from .support import SLOW, page_bytes

SECONDS = int(os.environ.get("UMEM_STRESS_SECONDS", "20"))
SEED = int(os.environ.get("UMEM_STRESS_SEED", str(int(time.time()))))


class Lanes:
    """Three threads that serve one area: one by request, two ahead of time.

    A page is filled by the lane that claimed it, before anybody marks it; marks overlap on purpose
    with what is marked already.
    """

    def __init__(self, area: Area, seed: int) -> None:
        self.area = area
        self.claims = bytearray(area.npages)
        self.filled = bytearray(area.npages)
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._guard, args=[self._requests])]
        for lane in range(2):
            order = random.Random(seed + lane)
            self.threads.append(threading.Thread(target=self._guard, args=[self._ahead, order]))

    def _guard(self, lane: Callable[..., None], *args: object) -> None:
        try:
            lane(*args)
        except BaseException as e:
            self.errors.append(e)

    def _serve(self, pgoff: int, count: int, marks: uapi.MarkBuffer) -> None:
        for page in range(pgoff, pgoff + count):
            with self.lock:
                mine = not self.claims[page]
                self.claims[page] = 1
            if mine:
                with self.area.view(page, 1) as view:
                    view[:] = page_bytes(page)
                self.filled[page] = 1
            if self.filled[page]:
                marks.add(page, 1)
        marks.flush(self.area.server_fd)

    def _requests(self) -> None:
        marks = uapi.MarkBuffer()
        while not self.stop.is_set():
            if select.select([self.area.server_fd], [], [], 0.02)[0]:
                for page in list(self.area.requests()[::2]):
                    self._serve(page, 1, marks)

    def _ahead(self, order: random.Random) -> None:
        marks = uapi.MarkBuffer()
        while not self.stop.is_set():
            start = order.randrange(self.area.npages)
            self._serve(start, min(order.randrange(1, 24), self.area.npages - start), marks)
            time.sleep(0.002)

    def __enter__(self) -> Lanes:
        self.area.set_blocking(False)
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


@pytest.mark.timeout(120)
def test_many_threads_and_several_lanes(new_area: Callable[[int], Area]) -> None:
    """32 threads read and check every word of every page, each in an order of its own."""
    area = new_area(1000)
    print(f"seed {SEED}")
    with Lanes(area, SEED):
        storm = subprocess.run(
            [program("storm"), area.node, str(area.npages), "32", str(SEED % 100000)],
            check=False,
            capture_output=True,
            text=True,
            timeout=110 * SLOW,
        )
    assert storm.returncode == 0, storm.stdout + storm.stderr
    found = re.fullmatch(r"bad=0 remaps=(\d+)\n", storm.stdout)
    assert found
    assert int(found[1]) > 0
    assert area.info().complete


def test_a_storm_notices_a_wrong_page(new_area: Callable[[int], Area]) -> None:
    """The negative control: one wrong word in one page."""
    area = new_area(20)
    for page in range(20):
        area.map[page * 4096 : (page + 1) * 4096] = page_bytes(page)
    area.map[7 * 4096 + 800] ^= 1
    area.mark([(0, 20)])
    storm = subprocess.run(
        [program("storm"), area.node, "20", "2", "1"], check=False, capture_output=True, text=True
    )
    assert storm.returncode == 1
    assert "page 7 word 100" in storm.stderr


@pytest.mark.timeout(SECONDS + 100)
def test_everything_at_once() -> None:
    """See progs/stress.c."""
    print(f"seed {SEED}")
    try:
        stress = subprocess.run(
            [program("stress"), str(SECONDS), str(SEED)],
            check=False,
            capture_output=True,
            text=True,
            timeout=SECONDS + 90 * SLOW,
        )
    except subprocess.TimeoutExpired as e:
        # Perhaps it ended long ago, and what it left behind has its ends of the pipes.
        pytest.fail(f"it does not end: {e.stdout!r} {e.stderr!r}")
    assert stress.returncode == 0, stress.stdout + stress.stderr
    counts = {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", stress.stdout)}
    print(counts)
    assert counts["bad"] == 0
    assert counts["rounds"] > SECONDS // (4 * SLOW)
    often = ["ops", "requests", "reattached", "killed", "plain", "locked", "poisoned", "logged"]
    # A mutex is not often held by somebody who is killed, nor a page hit before it is served.
    rarely = ["orphans", "poison_hits"] if SECONDS >= 120 else []
    assert all(counts[key] > 0 for key in often + rarely), counts
