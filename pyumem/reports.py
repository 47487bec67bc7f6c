# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of migrations that are over, from and to this host: files in the runtime directory, the
last KEPT of them.

`umemctl migrate` leaves the source's, `umemctl serve` the destination's.  Nothing depends on them:
one that cannot be written is a line in the log.
"""

from __future__ import annotations

import datetime
import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyumem import runtime
from pyumem.errors import UmemError

log = logging.getLogger(__name__)

KEPT: Final = 50


class Side(StrEnum):
    """Who tells."""

    SOURCE = "source"
    DESTINATION = "destination"


def keep(side: Side, report: dict[str, Any]) -> None:
    """Leave a report, which names its "vm", and forget the oldest.  Raises nothing: how a migration
    ended does not change with it.
    """
    now = datetime.datetime.now(datetime.UTC)
    try:
        directory = runtime.make_private(runtime.reports_dir())
        name = f"{now:%Y%m%dT%H%M%S.%fZ}-{side}-{runtime.check_name(report['vm'])}.json"
        told = {"side": side, "ended_at": now.isoformat(timespec="milliseconds"), **report}
        runtime.write_record(directory / name, told)
        # By name is by time.  What another process is only writing is the newest.
        for old in sorted(directory.iterdir())[:-KEPT]:
            old.unlink(missing_ok=True)
    except (UmemError, OSError, ValueError, TypeError) as e:
        log.warning("%s: its report cannot be kept: %s", report.get("vm"), e)


def read(vm: str | None = None, last: int | None = None) -> list[dict[str, Any]]:
    """Return the reports of a VM, or of all, oldest first; of them the last so many.

    What is no report is passed over.  Raises UsageError when there is no runtime directory.
    """
    found = []
    for path in sorted(runtime.reports_dir().glob("*.json")):
        report = _read(path)
        if report is not None and vm in (None, report["vm"]):
            found.append(report)
    return found if last is None else found[max(0, len(found) - last) :]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # forgotten meanwhile
    known = isinstance(report, dict) and isinstance(report.get("vm"), str)
    return report if known and report.get("side") in tuple(Side) else None
