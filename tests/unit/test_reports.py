# SPDX-License-Identifier: GPL-2.0-or-later
"""What stays of a migration when it is over."""

from __future__ import annotations

import errno
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result

from pyumem import latency, reports
from pyumem.area import Area
from pyumem.arrival import ArrivalReport, DriverCounts, prefetched, resident_map
from pyumem.cli.main import main
from pyumem.errors import DriverError
from pyumem.report import Report, State, report_of, take_arrival
from pyumem.reports import Side
from pyumem.stats import NR_BUCKETS, StatsBlock, Totals, bucket_of


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "run"
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(path))
    monkeypatch.setenv("COLUMNS", "200")
    yield path


def totals(*latencies_ns: int, **more: int) -> Totals:
    buckets = [0] * NR_BUCKETS
    for ns in latencies_ns:
        buckets[bucket_of(ns)] += 1
    return Totals(buckets=buckets, latency_max_ns=max(latencies_ns, default=0), **more)


def arrival() -> ArrivalReport:
    known: dict[str, Any] = {
        "vm": "vm1",
        "source_vm": "vm1",
        "peer": "[fd00::1]:4000",
        "session": "0",
        "state": State.COMPLETED,
        "error": "",
        "guest_ended": "",
        "total_s": 2.0,
        "time_to_resident_s": 1.5,
        "ram_bytes": 400 * 4096,
        "pages_total": 400,
        "pages_demand": 100,
        "pages_background": 200,
        "pages_zero": 100,
        "pages_prefetched": 3,
        "pages_uncounted": 0,
        "requests": 97,
        "memory_waits": 0,
        "driver": DriverCounts(120, 23, 456.5),
        "latencies": totals(300_000, 900_000),
        "bytes_received_by_lane": {"control": 1024, "urgent-0": 2048},
        "recoveries": 0,
    }
    return ArrivalReport(**known)


def umemctl(*words: str) -> Result:
    return CliRunner().invoke(main, words)


# --- the files ---


def test_the_last_are_kept_and_no_more(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "KEPT", 4)
    for number in range(7):
        reports.keep(Side.SOURCE, {"vm": f"vm{number % 2}", "number": number})
    assert [one["number"] for one in reports.read()] == [3, 4, 5, 6]
    assert [one["number"] for one in reports.read("vm0")] == [4, 6]
    assert [one["number"] for one in reports.read("vm1", 1)] == [5]
    assert reports.read("vm7") == []
    assert len(list((runtime_dir / "reports").iterdir())) == 4
    assert (runtime_dir / "reports").stat().st_mode & 0o777 == 0o700


def test_none_at_all() -> None:
    assert reports.read() == []


@pytest.mark.parametrize("vm", ["vm1", "../x", ""])
def test_what_cannot_be_kept_is_no_error(
    vm: str, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime_dir.mkdir()
    (runtime_dir / "reports").write_text("in the way")
    reports.keep(Side.DESTINATION, {"vm": vm})
    assert "its report cannot be kept" in caplog.text


def test_what_is_no_report_is_passed_over(runtime_dir: Path) -> None:
    reports.keep(Side.SOURCE, {"vm": "vm1"})
    directory = runtime_dir / "reports"
    for at, text in enumerate(("", "[]", "{}", '{"vm": 1, "side": "source"}', '{"vm": "x"}')):
        (directory / f"9{at}.json").write_text(text)
    assert [one["vm"] for one in reports.read()] == ["vm1"]


# --- what they say ---


def test_a_source_report_comes_back() -> None:
    report = Report("vm1", "tcp:a:1", "0", State.FAILED, error="no", downtime_ms=1.5)
    told = json.loads(json.dumps(report.to_json()))
    assert report_of({**told, "of a later version": 1}) == report


def test_the_source_takes_over_what_the_destination_counted() -> None:
    report = Report("vm1", "tcp:a:1", "0", State.COMPLETED)
    take_arrival(report, DriverCounts(120, 23, 456.5).to_json())
    assert (report.faults_major, report.faults_duplicate, report.blocked_ms) == (120, 23, 456.5)
    take_arrival(report, {"faults_major": True, "faults_duplicate": -1, "blocked_ms": "x"})
    assert (report.faults_major, report.faults_duplicate, report.blocked_ms) == (120, 23, 456.5)


def test_every_number_of_the_destination_has_its_unit() -> None:
    units = ("_ms", "_s", "_us", "_bytes")
    counts = ("requests", "recoveries", "memory_waits")
    for name, value in arrival().to_json().items():
        if isinstance(value, int | float):
            counted = name in counts or name.startswith(("pages_", "bytes_", "faults_"))
            assert counted or name.endswith(units), name


def test_report_shows_both_sides() -> None:
    assert umemctl("report").exit_code == 1
    source = Report("vm1", "tcp:a:1", "0", State.FAILED, error="no [/route]", downtime_ms=42.25)
    reports.keep(Side.SOURCE, source.to_json())
    reports.keep(Side.DESTINATION, arrival().to_json())
    text = umemctl("report", "vm1", "--last", "2").output
    for word in ("42.2 ms", "failed", "no [/route]", "from [fd00::1]:4000", "1.50 s"):
        assert word in text, word
    for word in ("120, 456 ms together", "900 us", "bytes on urgent-0", "2.0 KiB"):
        assert word in text, word
    assert "42.2 ms" not in umemctl("report").output, "the last one only"
    told = json.loads(umemctl("report", "--json").stdout)["reports"]
    assert [one["side"] for one in told] == ["source", "destination"]
    assert told[1]["demand_latency_histogram"] == [
        {"up_to_us": 524.287, "requests": 1},
        {"up_to_us": 1048.575, "requests": 1},
    ]
    assert told[1]["bytes_received"] == 3072
    none = umemctl("report", "vm2", "--json")
    assert none.exit_code == 1 and json.loads(none.stdout) == {"reports": []}


def test_a_report_of_another_version_is_shown_as_it_is() -> None:
    reports.keep(Side.DESTINATION, {"vm": "vm1", "pages": 7})
    result = umemctl("report")
    assert result.exit_code == 0 and '"pages": 7' in result.output


# --- where the numbers come from ---


@pytest.mark.parametrize("ns", [0, 1, 16383, 16384, 16385, 1 << 34, (1 << 34) - 1, 1 << 60])
def test_a_latency_is_counted_below_its_limit(ns: int) -> None:
    (at,) = [i for i, n in enumerate(latency.counts(totals(ns))) if n]
    limits = (-1, *latency.LIMITS_NS, 1 << 64)
    assert limits[at] < ns <= limits[at + 1]


def test_the_sum_of_latencies() -> None:
    exact = [3, 17, 1000, 250_000, 7_000_001, 3_000_000_000]
    assert latency.sum_s(totals(*exact)) == pytest.approx(sum(exact) / 1e9, rel=1 / 32)
    assert latency.sum_s(Totals()) == 0
    assert latency.to_json(Totals()) == []


def test_what_came_unasked() -> None:
    block = StatsBlock.create("test")
    block.latency(1000)
    block.latency(2000)
    urgent = block.read()
    urgent.pages, urgent.zero_pages = 4, 1
    assert prefetched(urgent) == 3
    block.close()


class MapArea:
    def __init__(self, granules: str, granule_size: int = 4096) -> None:
        self.name, self.granule_size = "ram0", granule_size
        self.size = len(granules) * granule_size
        number = int(granules[::-1] or "0", 2)
        self._words = array("Q")
        for at in range(0, len(granules), 64):
            self._words.append(number >> at & (1 << 64) - 1)

    def bitmap(self) -> array[int]:
        return self._words


def map_of(*granules: str, shares: int = 60) -> str:
    return resident_map(cast(list[Area], [MapArea(one) for one in granules]), shares)


def test_the_map_of_resident_memory() -> None:
    assert map_of("1" * 600) == "9" * 60
    assert map_of("0" * 601) == "0" * 60
    assert map_of("1" * 300 + "0" * 300) == "9" * 30 + "0" * 30
    assert map_of("1" * 99 + "0" + "0" * 99 + "1", shares=2) == "81"
    assert map_of("10" * 50, shares=1) == "5"
    assert map_of("101") == "909", "fewer granules than shares"
    assert map_of("1" * 70, "0" * 70, shares=2) == "90", "areas one behind the other"
    assert map_of("0" * 65 + "1" * 65, shares=2) == "09"
    assert map_of() == ""


class DeafArea:
    def stats(self) -> object:
        raise DriverError("UMEM_GET_STATS", errno.EIO, area="ram1")


class CountingArea:
    def stats(self) -> object:
        return SimpleNamespace(nr_major=2, nr_duplicate=1, blocked_ns=1_500_000)


def test_an_area_that_does_not_tell_is_left_out() -> None:
    areas = cast(list[Area], [CountingArea(), DeafArea(), CountingArea()])
    assert DriverCounts.of(areas) == DriverCounts(4, 2, 3.0)
