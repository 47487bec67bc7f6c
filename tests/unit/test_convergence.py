# SPDX-License-Identifier: GPL-2.0-or-later
"""When pre-copy ends, by the figures of its rounds."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from pyumem.convergence import WINDOW, Convergence, Decision, Limits, Round, Verdict

SPEED = 10_000  # pages a second


def play(
    limits: Limits, dirties: Callable[[int, float], int], total: int = 100_000, most: int = 200
) -> list[Decision]:
    """A guest that dirties(round, seconds) pages while a round of so many seconds runs."""
    convergence = Convergence(limits)
    decisions, elapsed, pages = [], 0.0, total
    for number in range(1, most):
        seconds = pages / SPEED
        elapsed += seconds
        remaining = min(total, dirties(number, seconds))
        decision = convergence.judge(Round(pages, pages * 4100, seconds, remaining), elapsed)
        decisions.append(decision)
        if decision.verdict is not Verdict.GO_ON:
            return decisions
        pages = remaining
    raise AssertionError("it never ends")


def test_an_idle_guest_is_done_after_a_round() -> None:
    (only,) = play(Limits(), lambda _n, _s: 50)
    assert only.verdict is Verdict.FINISH and only.downtime_s < 0.3
    assert "within 300 ms" in only.reason


def test_a_guest_that_writes_slower_than_the_network_converges() -> None:
    decisions = play(Limits(max_downtime_s=0.1), lambda _n, s: int(s * SPEED * 0.5))
    assert decisions[-1].verdict is Verdict.FINISH
    assert 5 < len(decisions) < 20


def test_one_that_writes_faster_does_not_and_that_is_noticed_soon() -> None:
    for may_switch, verdict in ((True, Verdict.SWITCH), (False, Verdict.GIVE_UP)):
        limits = Limits(may_switch=may_switch)
        decisions = play(limits, lambda _n, s: int(s * SPEED * 1.2))
        assert decisions[-1].verdict is verdict
        assert len(decisions) <= 2 * WINDOW + 2
        assert "no less than" in decisions[-1].reason


def test_the_switch_waits_for_a_round_that_ends_low() -> None:
    """The remaining set swings: the switch is not at its peak."""
    remains = [40_000, 20_000, 40_000, 38_000, 39_000, 21_000, 40_000]
    decisions = play(Limits(may_switch=True), lambda n, _s: remains[n - 1])
    assert decisions[-1].verdict is Verdict.SWITCH
    assert remains[len(decisions) - 1] == 21_000


def test_but_not_for_ever() -> None:
    remains = [40_000, 20_000] + 50 * [39_000]
    decisions = play(Limits(may_switch=True), lambda n, _s: remains[n - 1])
    assert decisions[-1].verdict is Verdict.SWITCH and len(decisions) <= 2 * WINDOW + 4


def test_a_limit_of_time() -> None:
    limits = Limits(max_precopy_s=30.0, may_switch=True, max_downtime_s=0.001)
    decisions = play(limits, lambda n, _s: 100_000 - 100 * n)
    assert decisions[-1].verdict is Verdict.SWITCH and "30 s of pre-copy are over" in (
        decisions[-1].reason
    )
    assert len(decisions) == 4


def test_so_many_rounds_whatever_they_bring() -> None:
    for dirty in (0, 100_000):
        limits = Limits(rounds=4, may_switch=True)
        decisions = play(limits, lambda n, _s: 0 * n + dirty)  # noqa: B023
        assert [one.verdict for one in decisions] == 3 * [Verdict.GO_ON] + [Verdict.SWITCH]


@given(
    st.lists(st.integers(0, 100_000), min_size=1, max_size=30),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_it_always_ends(remains: list[int], may_switch: bool, rounds: int | None) -> None:
    limits = Limits(may_switch=may_switch or rounds is not None, rounds=rounds)
    decisions = play(limits, lambda n, _s: remains[(n - 1) % len(remains)], most=400)
    assert decisions[-1].verdict is not Verdict.GO_ON
    if limits.may_switch:
        assert decisions[-1].verdict is not Verdict.GIVE_UP


def test_any_limit_can_be_met() -> None:
    decisions = play(Limits(max_downtime_s=0.001), lambda n, _s: 100 if n < 4 else 0)
    assert decisions[-1].verdict is Verdict.FINISH and len(decisions) == 4


def test_zero_pages_do_not_make_the_network_faster() -> None:
    """64 GiB, 4 of them with content, over 1 Gbit/s: what remains has content."""
    first = Round(1 << 24, (1 << 20) * 4120, 36.0, 100_000)
    decision = Convergence(Limits()).judge(first, 36.0)
    assert decision.verdict is Verdict.GO_ON and decision.downtime_s > 3


def test_a_guest_that_only_clears_pages_converges() -> None:
    """Its pages go as ranges, with hardly a byte: that is no slow network."""
    judge = Convergence(Limits())
    judge.judge(Round(1 << 16, (1 << 14) * 4120, 1.0, 90_000), 1.0)
    for number in range(4):
        decision = judge.judge(Round(50_000, 20_000, 0.05, 20_000), 2.0 + number)
        assert decision.verdict is Verdict.FINISH, decision


def test_nothing_but_zeros_is_no_reason_to_give_up() -> None:
    decision = Convergence(Limits()).judge(Round(1 << 16, 0, 1.0, 100), 1.0)
    assert decision.verdict is Verdict.FINISH
