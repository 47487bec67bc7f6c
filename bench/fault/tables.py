# SPDX-License-Identifier: GPL-2.0-or-later
"""The results as tables for a terminal."""

from collections.abc import Iterator

from rich.table import Table

from bench.fault import plan
from bench.fault.results import Results, middle, ratio, wanted


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _spread(values: list[float]) -> str:
    """Return the median and how far the rounds are apart."""
    half = (max(values) - min(values)) / 2 / middle(values)
    return f"{middle(values):.1f} ±{half:.0%}"


def _size(mib: int) -> str:
    return f"{mib // 1024} GiB" if mib >= 1024 else f"{mib} MiB"


def _faults(results: Results) -> Table:
    table = _table(
        "Microseconds per fault (median of rounds), ratios of umem",
        *("threads", "COPY", "bare COPY", "CONTINUE", "umem", "in place"),
        *("/ COPY", "/ bare", "/ CONTINUE", "/ ping-pong"),
    )
    pingpong = results.pingpong()
    for threads in plan.THREADS:
        copy, bare, cont, ours, place = (results.fault(who, threads) for who in plan.FAULTERS)
        table.add_row(
            str(threads),
            *(_spread(values) for values in (copy, bare, cont, ours, place)),
            f"{ratio(ours, copy):.2f}",
            f"{ratio(ours, bare):.2f}",
            f"{ratio(ours, cont):.2f}",
            f"{ratio(ours, pingpong):.2f}" if threads == 1 else "",
        )
    table.caption = (
        f"ping-pong over two pipes: {_spread(pingpong)} us.  Each page arrives by a memcpy; bare "
        "COPY takes it from where it lies; umem takes it into a buffer and writes the file, in "
        "place into a mapping."
    )
    return table


def _fill(results: Results) -> Table:
    table = _table(
        "Filling ahead, thousand pages per second, ratios of umem",
        *("run", "COPY", "bare COPY", "CONTINUE", "umem", "+ TOUCH", "in place", "memcpy", "warm"),
        *("huge", "/ COPY", "/ bare", "/ memcpy"),
    )
    for run_kib in plan.RUNS_KIB:
        ours = results.fill("umem", run_kib)
        table.add_row(
            f"{run_kib} KiB",
            *(f"{middle(results.fill(who, run_kib)) / 1000:.1f}" for who in plan.FILLERS),
            f"{middle(results.fill(plan.HUGE_FILLER, run_kib)) / 1000:.1f}"
            if run_kib == plan.HUGE_KIB
            else "",
            *(
                f"{ratio(ours, results.fill(who, run_kib)):.2f}"
                for who in ("copy", "copy-bare", "plain")
            ),
        )
    table.caption = (
        "memcpy: into new shared memory, warm: into what is there, huge: an area whose granule "
        "and pages are 2 MiB.  umem takes the run into a buffer and writes it, in place into a "
        "mapping.  COPY, CONTINUE and TOUCH map the pages for the consumer; the others leave that "
        "to its touch."
    )
    return table


def _sizes(results: Results) -> Table:
    table = _table(
        f"Microseconds per fault by size of the area, {plan.SIZE_THREADS} threads",
        "size",
        *(f"{who}, {spread}" for spread in ("blocks", "all") for who in plan.SIZERS),
    )
    for mib in plan.SIZES_MIB:
        table.add_row(
            _size(mib),
            *(
                f"{middle(results.size(who, mib, spread)):.1f}"
                for spread in ("blocks", "all")
                for who in plan.SIZERS
            ),
        )
    table.caption = (
        "blocks: in 128 blocks of 2 MiB, so that page tables are as many in each area; all: "
        "anywhere, most faults with a page table of their own.  plain: a first touch, unserved."
    )
    return table


def _memory(results: Results) -> Table:
    table = _table("Kernel memory, KiB for each GiB of area", "area", "charged", "whole kernel")
    for gib, _ in plan.MEMORY:
        table.add_row(
            f"{gib} GiB",
            f"{results.memory(gib, 'charged_kib'):.1f}",
            f"{results.memory(gib, 'kernel_kib'):.1f}",
        )
    return table


def _complete(results: Results) -> Table:
    table = _table(
        "A complete area, nanoseconds (ratio to memfd)",
        *("mapping", "first touch of a page", "access when mapped"),
    )
    for kind in ("memfd", "before", "after"):
        cells = []
        for key in ("first_ns", "steady_ns"):
            values, memfd = results.complete(kind, key), results.complete("memfd", key)
            cells.append(f"{middle(values):.2f} ({ratio(values, memfd):.3f})")
        table.add_row(kind, *cells)
    table.caption = "before and after UMEM_MAKE_VMA_ANONYMOUS"
    return table


def _wanted(results: Results) -> Table:
    table = _table("Against what is wanted", "what", "median", "best", "wanted", "")
    for one in wanted(results):
        table.add_row(
            one.what,
            f"{one.measured:.3g}",
            "" if one.best is None else f"{one.best:.3g}",
            f"{'<=' if one.at_most else '>='} {one.limit:g}",
            "[green]met[/]" if one.met else "[red]missed[/]",
        )
    return table


def tables(results: Results) -> Iterator[Table]:
    """Yield every table, the verdict last."""
    yield _faults(results)
    yield _fill(results)
    yield _sizes(results)
    yield _memory(results)
    yield _complete(results)
    yield _wanted(results)
