# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured: the contenders, and the settings that they meet alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from bench.migration.results import Setting


@dataclass(frozen=True)
class Contender:
    """One way to move a VM."""

    name: str
    text: str
    """For people, in a few words."""
    umem: tuple[str, ...] | None = None
    """Options of `umemctl migrate`; None: QEMU's own migration."""
    incoming: tuple[str, ...] = ()
    """More options of umem-qemu at the destination."""
    capabilities: tuple[str, ...] = ()
    """Of QEMU's migration, on both sides."""
    switch_after: int | None = None
    """QEMU's: passes over memory before it is told to switch to post-copy; None: never."""
    on_demand_s: float = 0.0
    """umem's -n: seconds after the switch until the background transfer is let go."""


POSTCOPY: Final = ("postcopy-ram", "postcopy-preempt", "postcopy-blocktime")

CONTENDERS: Final = (
    Contender("qemu-precopy", "QEMU, pre-copy"),
    Contender(
        "qemu-autoconverge", "QEMU, pre-copy that slows the guest", capabilities=("auto-converge",)
    ),
    Contender("qemu-postcopy", "QEMU, post-copy at once", capabilities=POSTCOPY, switch_after=0),
    Contender(
        "qemu-hybrid", "QEMU, one pass, then post-copy", capabilities=POSTCOPY, switch_after=1
    ),
    Contender("umem-precopy", "umemctl migrate", umem=()),
    Contender("umem-hybrid", "umemctl migrate --hybrid", umem=("--hybrid",)),
    Contender("umem-postcopy", "umemctl migrate -p", umem=("-p",)),
    Contender(
        "umem-n", "umemctl migrate -p -n, background after 5 s", umem=("-p", "-n"), on_demand_s=5.0
    ),
    Contender(
        "umem-prefetch",
        "umemctl migrate -p --prefetch-forward 16 --prefetch-backward 4",
        umem=("-p", "--prefetch-forward", "16", "--prefetch-backward", "4"),
    ),
    Contender(
        "umem-touch",
        "umemctl migrate -p, destination with -postcopy-flags 1",
        umem=("-p",),
        incoming=("-postcopy-flags", "1"),
    ),
)
BY_NAME: Final = {one.name: one for one in CONTENDERS}


def _on(link: tuple[str | None, str | None], setting: Setting) -> Setting:
    rate, delay = link
    return replace(setting, rate=rate, delay=delay)


_SLOW: Final = ("100mbit", "2ms")
_OPEN: Final = (None, None)

SETTINGS: Final = (
    Setting("random", "random"),
    Setting("read", "read"),
    Setting("idle", "idle"),
    Setting("sequential", "sequential"),
    Setting("redis", "redis", working_set_mib=32),
    Setting("compute-2vcpu", "compute", vcpus=2),
    Setting("compute-2vcpu-no-apf", "compute", vcpus=2, async_pf=False),
    Setting("random-no-apf", "random", async_pf=False),
    Setting("random-2vcpu", "random", vcpus=2),
    Setting("random-4vcpu", "random", vcpus=4),
    Setting("read-1g", "read", memory_mib=1024, working_set_mib=512),
    Setting("read-2g", "read", memory_mib=2048, working_set_mib=512),
    _on(_OPEN, Setting("random-unshaped", "random")),
    _on(_OPEN, Setting("read-unshaped", "read")),
    _on(_SLOW, Setting("random-100mbit", "random", working_set_mib=64)),
    _on(_SLOW, Setting("read-100mbit", "read", working_set_mib=64)),
    _on(_SLOW, Setting("random-tcg", "random", working_set_mib=64, accel="tcg")),
    _on(_SLOW, Setting("read-tcg", "read", working_set_mib=64, accel="tcg")),
)

_ALL: Final = tuple(one.name for one in CONTENDERS)
_MAIN: Final = ("qemu-precopy", "qemu-postcopy", "umem-hybrid", "umem-postcopy")
_POST: Final = ("qemu-postcopy", "umem-postcopy")
_PLAYERS: Final = {
    "random": _ALL,
    "read": _ALL,
    "idle": (*_MAIN, "umem-precopy"),
    "sequential": (*_MAIN, "umem-prefetch"),
    "redis": (*_MAIN, "qemu-autoconverge", "qemu-hybrid", "umem-precopy"),
    "compute-2vcpu": (*_POST, "umem-n"),
    "compute-2vcpu-no-apf": (*_POST, "umem-n"),
    "random-no-apf": _POST,
    "random-2vcpu": _POST,
    "random-4vcpu": _POST,
    "read-2g": _POST,
    "random-unshaped": _POST,
    "read-unshaped": _POST,
}
"""Who meets a setting, where that is not _MAIN: all of them in all settings would take a night."""


def players(setting: str, chosen: Sequence[str] = ()) -> list[str]:
    """Return the contenders of a setting, in order: those chosen, or those that say most there."""
    wanted = chosen or _PLAYERS.get(setting, _MAIN)
    return [one.name for one in CONTENDERS if one.name in wanted]


QUICK_SETTINGS: Final = ("random", "read")
QUICK_CONTENDERS: Final = ("qemu-precopy", "qemu-postcopy", "umem-hybrid", "umem-postcopy")
QUICK_ROUNDS: Final = 2
ROUNDS: Final = 3
LIMIT_S: Final = 40.0
"""A migration that is not over by then does not converge: see limit_s()."""


def limit_s(setting: Setting) -> float:
    """Return how long a migration may take in this setting, in seconds."""
    factor = 3.0 if setting.rate == "100mbit" else 1.0
    return LIMIT_S * factor * max(1.0, setting.memory_mib / 512)
