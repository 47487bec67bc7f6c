# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl top."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any, Final

import click

from pyumem.cli.common import json_option, plain, print_json, share, size
from pyumem.cli.display import Rate, number
from pyumem.cli.status import ask_migrations, ask_serve
from pyumem.report import Progress, State
from pyumem.reports import Side

_ONCE_S: Final = 0.5
"""Seconds between the two looks that one sample's rates are told from."""
_BARS: Final = "▁▂▃▄▅▆▇█"
_SHADES: Final = "·░░░▒▒▒▓▓█"


@dataclass(frozen=True, slots=True)
class Row:
    """One VM on one side, as it is now."""

    vm: str
    side: str
    state: str
    peer: str
    pages_done: int
    pages_total: int
    rate_bytes_s: float
    eta_s: float | None
    faults_per_s: float
    """At the destination faults that slept; at the source pages that were asked for."""
    bytes_by_lane: dict[str, int]
    demand_latency_p50_us: float | None
    """Latencies are known at the destination only, as is the map."""
    demand_latency_p99_us: float | None
    demand_latency_histogram: list[dict[str, Any]]
    resident_map: str


class _Watch:
    """What rates need to remember of one VM on one side, from one migration."""

    def __init__(self) -> None:
        self.rate = Rate()
        self._faults: list[tuple[float, int]] = []

    def see(self, progress: Progress, faults: int) -> float:
        """Take note.  Returns faults per second since the last look."""
        self.rate.see(progress)
        self._faults = [*self._faults[-1:], (time.monotonic(), faults)]
        (t0, n0), (t1, n1) = self._faults[0], self._faults[-1]
        return max(0, n1 - n0) / (t1 - t0) if t1 > t0 else 0.0


class Watches:
    """Looks at everything, again and again."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._seen: dict[tuple[str, str, str], _Watch] = {}

    def look(self) -> list[Row]:
        """Ask the daemon and the running migrations of this host."""
        found, rows = {}, []
        serve = ask_serve(detail=True)
        told = [(Side.DESTINATION, vm, vm["migration"]) for vm in (serve or {}).get("vms", ())]
        told += [(Side.SOURCE, one, one) for one in ask_migrations()]
        for side, vm, migration in told:
            key = (side.value, vm["name"], (migration or {}).get("session", ""))
            found[key] = watch = self._seen.get(key) or _Watch()
            rows.append(_row(side, vm, migration, watch))
        self._seen = found
        return rows


def _row(side: Side, vm: dict[str, Any], migration: dict[str, Any] | None, watch: _Watch) -> Row:
    now = migration or {}
    source = side is Side.SOURCE
    progress, faults_per_s = None, 0.0
    if migration:
        known = {each.name: migration[each.name] for each in fields(Progress)}
        progress = Progress(**{**known, "state": State(migration["state"])})
        faults_per_s = watch.see(progress, migration["requests" if source else "faults_major"])
    return Row(
        vm=vm["name"],
        side=side.value,
        state=vm["state"],
        peer=now.get("destination" if source else "peer", ""),
        pages_done=progress.pages_done if progress else 0,
        pages_total=progress.pages_total if progress else 0,
        rate_bytes_s=round(watch.rate.bytes, 1),
        eta_s=_eta_s(progress, watch.rate),
        faults_per_s=round(faults_per_s, 1),
        bytes_by_lane=now.get("bytes_sent_by_lane" if source else "bytes_received_by_lane", {}),
        demand_latency_p50_us=now.get("demand_latency_p50_us"),
        demand_latency_p99_us=now.get("demand_latency_p99_us"),
        demand_latency_histogram=vm.get("demand_latency_histogram", []),
        resident_map=vm.get("resident_map", ""),
    )


def _eta_s(progress: Progress | None, rate: Rate) -> float | None:
    eta = rate.eta_s(progress) if progress else None
    return None if eta is None else round(eta, 1)


def to_json(row: Row) -> dict[str, Any]:
    """Return the JSON form."""
    return {each.name: getattr(row, each.name) for each in fields(Row)}


def draw(row: Row) -> list[str]:
    """Return the lines that show it."""
    side = "to" if row.side == Side.SOURCE else "from"
    first = f"{row.vm}: {row.state}"
    if row.peer:
        first += f", {side} {plain(row.peer)}"
    lines = [first]
    if row.pages_total:
        lines.append(
            f"  {share(row.pages_done, row.pages_total)} of {row.pages_total} pages, "
            f"{size(row.rate_bytes_s)}/s, ETA {number(row.eta_s, 's', 0)}, "
            f"{row.faults_per_s:.0f} {'requests' if row.side == Side.SOURCE else 'faults'}/s"
        )
        lanes = ", ".join(f"{lane} {size(n)}" for lane, n in row.bytes_by_lane.items())
        lines.append(f"  lanes: {lanes}")
    if row.demand_latency_p50_us is not None:
        p50, p99 = (
            number(us, "us", 0) for us in (row.demand_latency_p50_us, row.demand_latency_p99_us)
        )
        lines.append(f"  latency p50 {p50}, p99 {p99}  {_histogram(row.demand_latency_histogram)}")
    if row.resident_map:
        lines.append(f"  memory [{''.join(_SHADES[int(one)] for one in row.resident_map)}]")
    return lines


def _histogram(buckets: list[dict[str, Any]]) -> str:
    """Return one character for each bucket, and what the first and the last count up to."""
    if not buckets:
        return ""
    most = max(one["requests"] for one in buckets)
    bars = "".join(
        _BARS[max(0, -(-one["requests"] * len(_BARS) // most) - 1)] if one["requests"] else " "
        for one in buckets
    )
    first, last = (
        "longer" if us is None else number(us / 1000, "ms", 2)
        for us in (buckets[0]["up_to_us"], buckets[-1]["up_to_us"])
    )
    return f"{first} |{bars}| {last}"


def _text(rows: list[Row]) -> str:
    if not rows:
        return "nothing is expected, received or sent here"
    return "\n".join(line for row in rows for line in draw(row))


@click.command()
@click.option("--once", is_flag=True, help="Print one sample and end.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two samples.",
)
@json_option
def command(once: bool, interval: float, as_json: bool) -> None:
    """Watch the VMs that this host expects, receives and sends, until Ctrl-C.

    For each: state, progress, rate, bytes by lane; at the destination also how long requests for
    pages take, with their histogram by powers of two, and which parts of the memory are here.
    --json prints one sample and ends, too.

    \b
    Examples:
      umemctl top
      umemctl top --once
      umemctl top --json | jq '.vms[] | [.vm, .state, .eta_s]'
    """
    watches = Watches()
    if once or as_json:
        watches.look()
        time.sleep(_ONCE_S)
        rows = watches.look()
        if as_json:
            print_json({"vms": [to_json(row) for row in rows]})
        else:
            click.echo(_text(rows))
        return
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(Text(_text(watches.look())), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(interval)
                live.update(Text(_text(watches.look())), refresh=True)
    except KeyboardInterrupt:
        pass
