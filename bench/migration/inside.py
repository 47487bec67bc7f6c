# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the bench that runs in the test machine: all settings, one line of JSON a sample."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import click

from bench.migration.contest import contest
from bench.migration.plan import BY_NAME, SETTINGS, players
from bench.migration.results import link_name


def _tell(what: str, told: object) -> None:
    print(json.dumps({"what": what, **asdict(told)}), flush=True)  # type: ignore[call-overload]


@click.command()
@click.option("--settings", required=True)
@click.option("--contenders", default="")
@click.option("--rounds", type=int, required=True)
def main(settings: str, contenders: str, rounds: int) -> None:
    """Measure, round by round, every contender in turn."""
    made = Path(os.environ["UMEM_BUILD"]) / "bench-guest" / "initramfs.cpio"
    # QEMU reads it at every boot, over 9p otherwise.
    os.environ["UMEM_GUEST_INITRD"] = shutil.copy(made, "/dev/shm/bench-initramfs.cpio")
    wanted = [one for one in SETTINGS if one.name in settings.split(",")]
    by_link = defaultdict(list)
    for setting in wanted:
        by_link[link_name(setting)].append(setting)
    for link, alike in by_link.items():
        with contest(alike[0]) as scene:
            for setting, number in itertools.product(alike, range(rounds)):
                if not number:
                    print(json.dumps({"what": "setting", "name": setting.name}), flush=True)
                limit = scene.limit()
                print(json.dumps({"what": "limit", "link": link, **asdict(limit)}), flush=True)
                for name in players(setting.name, contenders.split(",") if contenders else ()):
                    _tell("sample", scene.measure(setting, BY_NAME[name], number))


if __name__ == "__main__":
    main(prog_name="python -m bench.migration.inside")
