# SPDX-License-Identifier: GPL-2.0-or-later
"""Which neighbours of a requested page are sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyumem.lanes.prefetch import MAX_PAGES, PIECE_PAGES, Ahead, Prefetch, Window


def test_around_the_first_request_is_what_was_asked_for() -> None:
    window = Window(Prefetch(forward=16, backward=4), 1000)
    assert window.around(100, 2) == [(102, 16), (96, 4)]


def test_sequential_access_widens_up_to_a_limit() -> None:
    window = Window(Prefetch(forward=16), 100_000)
    at, sizes = 0, []
    for _ in range(6):
        ((first, count),) = window.around(at, 1)
        assert first == at + 1
        sizes.append(count)
        at = first + count  # what came is not asked for
    assert sizes == [16, 32, 64, 128, 128, 128]


def test_access_backwards_widens_what_is_before_and_nothing_else() -> None:
    window = Window(Prefetch(forward=8, backward=16), 100_000)
    at, sizes = 50_000, []
    for _ in range(6):
        ranges = window.around(at, 1)
        first, count = ranges[-1]
        assert first + count == at
        sizes.append([nr for _, nr in ranges])
        at = first - 1
    assert sizes == [[8, 16], [4, 32], [2, 64], [1, 128], [128], [128]]


def test_random_access_shrinks_to_nothing_and_recovers() -> None:
    window = Window(Prefetch(forward=4), 100_000)
    window.around(50_000, 1)
    sizes = [sum(n for _, n in window.around(page, 1)) for page in (10, 90_000, 3, 70_000)]
    assert sizes == [2, 1, 0, 0]
    sizes = [sum(n for _, n in window.around(70_001 + page, 1)) for page in range(5)]
    assert sizes == [0, 1, 2, 4, 8]


@given(
    st.integers(0, MAX_PAGES),
    st.integers(0, MAX_PAGES),
    st.lists(st.tuples(st.integers(0, 299), st.integers(1, 300)), max_size=40),
)
def test_ranges_are_inside_the_area_and_not_what_was_asked_for(
    forward: int, backward: int, requests: list[tuple[int, int]]
) -> None:
    window = Window(Prefetch(forward, backward), 300)
    for pgoff, wanted in requests:
        count = min(wanted, 300 - pgoff)
        for first, nr in window.around(pgoff, count):
            assert nr > 0
            assert first >= 0
            assert first + nr <= 300
            assert first >= pgoff + count or first + nr <= pgoff


def test_pieces_are_small_and_the_newest_request_comes_first() -> None:
    ahead = Ahead(Prefetch(forward=PIECE_PAGES + 4), [1000, 1000])
    assert not ahead
    ahead.requested(0, 10, 1)
    ahead.requested(1, 500, 1)
    got = []
    while ahead:
        got.append(ahead.take())
    full = PIECE_PAGES
    assert got == [(1, 501, full), (1, 501 + full, 4), (0, 11, full), (0, 11 + full, 4)]


def test_what_is_before_comes_from_its_end_on() -> None:
    ahead = Ahead(Prefetch(backward=2 * PIECE_PAGES + 1), [1000])
    ahead.requested(0, 500, 1)
    got = []
    while ahead:
        got.append(ahead.take())
    full = PIECE_PAGES
    assert got == [(0, 500 - full, full), (0, 500 - 2 * full, full), (0, 499 - 2 * full, 1)]


def test_old_ranges_are_dropped() -> None:
    ahead = Ahead(Prefetch(forward=1), [100_000])
    for page in range(0, 1000, 2):
        ahead.requested(0, page, 1)
    got = []
    while ahead:
        got.append(ahead.take())
    assert len(got) == 64
    assert got[0][1] == 999


def test_without_a_wish_nothing_waits() -> None:
    ahead = Ahead(Prefetch(), [100])
    ahead.requested(0, 10, 1)
    assert not ahead
