# SPDX-License-Identifier: GPL-2.0-or-later
"""What a destination has to know of a VM when the daemon that received it is no more.

There is a record from before PREPARED is said until the VM has all its memory, or has ended.  The
areas themselves, and what of them is there, are the driver's.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pyumem import runtime
from pyumem.destination import Phase
from pyumem.hello import AreaSpec, Hello
from pyumem.process import ProcessName

log = logging.getLogger(__name__)


def directory() -> Path:
    """Return where they are kept."""
    return runtime.runtime_dir() / "incoming"


@dataclass(frozen=True, slots=True)
class IncomingRecord:
    """A VM that is here, or nearly, and whose memory is not."""

    name: str
    listen: str
    phase: Phase
    hello: Hello
    qmp: str
    incoming: str
    qemu: ProcessName
    autostart: bool
    touch: bool
    areas: tuple[AreaSpec, ...]
    area_ids: tuple[int, ...]
    """The driver's numbers of them, in the same order."""

    @property
    def ours(self) -> bool:
        """Tell whether COMMIT came: its QEMU is the VM."""
        return self.phase is not Phase.PREPARED

    def at(self, phase: Phase) -> IncomingRecord:
        """Return it with another phase."""
        return replace(self, phase=phase)

    @property
    def path(self) -> Path:
        """Return where it is kept."""
        return directory() / f"{runtime.check_name(self.name)}.json"

    def write(self) -> None:
        """Write it, all or nothing.  Raises UmemError."""
        runtime.make_private(directory())
        # Not asdict(self): the VM stands still, and a hello is large.
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        known["hello"] = self.hello.to_json()
        known["qemu"] = asdict(self.qemu)
        known["areas"] = [asdict(area) for area in self.areas]
        runtime.write_record(self.path, known)

    def remove(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> IncomingRecord:
        """Read one.  Raises ValueError, TypeError, KeyError, OSError, ProtocolError."""
        known = json.loads(path.read_text())
        return cls(
            **{
                **known,
                "phase": Phase(known["phase"]),
                "hello": Hello.from_json(known["hello"]),
                "qemu": ProcessName(**known["qemu"]),
                "areas": tuple(AreaSpec(**area) for area in known["areas"]),
                "area_ids": tuple(known["area_ids"]),
            }
        )


def left_behind() -> list[IncomingRecord]:
    """Return the records of this host; one that cannot be read is told of and left alone."""
    found = []
    for path in sorted(directory().glob("*.json")):
        try:
            found.append(IncomingRecord.read(path))
        except Exception as e:
            log.error("%s cannot be read: %s", path, e)
    return found
