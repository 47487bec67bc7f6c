# SPDX-License-Identifier: GPL-2.0-or-later
"""The file that says what `umemctl migrate` was about when it was killed.

It is there from before the VM stops until every page is at the destination, or the VM runs on here.
Until it says `committed`, which it does before COMMIT is said, the VM is this host's; from then on
its only memory is here, and the VM, as far as this host knows, elsewhere.  `umemctl migrate
--resume` finds in it what it needs in either case.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pyumem import runtime
from pyumem.address import Address, parse
from pyumem.errors import CheckError, UmemError, of_system
from pyumem.process import ProcessName
from pyumem.qemu import RamBlock


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """What is known of a VM that is about to leave, or has left."""

    vm: str
    session: str
    destination: str
    committed: bool
    committed_at: str
    answered: bool
    """The destination said that it has the VM; False: it may not have heard."""
    was_running: bool
    background_lanes: int
    qmp: str
    qemu: ProcessName
    """The source's QEMU, frozen; it must not run again once the VM is elsewhere."""
    ram: tuple[RamBlock, ...]

    @property
    def path(self) -> Path:
        """Return where it is kept."""
        return runtime.commit_record(self.vm)

    @property
    def address(self) -> Address:
        """Return the destination's address.  Raises UsageError."""
        return parse(self.destination, listening=False)

    def write(self) -> None:
        """Write it, all or nothing.  Raises UmemError."""
        runtime.write_record(self.path, asdict(self))

    def commit(self, when: str) -> CommitRecord:
        """Return, and write, that COMMIT is said next."""
        committed = replace(self, committed=True, committed_at=when)
        committed.write()
        return committed

    def stay(self) -> CommitRecord:
        """Return, and write if that can be, that the VM is to go on here."""
        staying = replace(self, committed=False, answered=False)
        with contextlib.suppress(UmemError):
            staying.write()
        return staying

    def answer(self, destination: Address) -> CommitRecord:
        """Return, and write, that the destination has the VM."""
        answered = replace(self, answered=True, destination=str(destination))
        answered.write()
        return answered

    def remove(self) -> None:
        """Remove it: nobody needs the memory any more."""
        self.path.unlink(missing_ok=True)

    @classmethod
    def read(cls, vm: str) -> CommitRecord:
        """Read a VM's record.  Raises CheckError when there is none, or none of this version."""
        path = runtime.commit_record(vm)
        try:
            known = json.loads(path.read_text())
            return cls(
                **{
                    **known,
                    "qemu": ProcessName(**known["qemu"]),
                    "ram": tuple(RamBlock(**block) for block in known["ram"]),
                }
            )
        except FileNotFoundError:
            raise CheckError(f"{vm} has not left this host: there is no {path}") from None
        except (ValueError, TypeError, KeyError) as e:
            raise CheckError(f"{path} cannot be read: {e}") from e
        except OSError as e:
            raise of_system(e) from e


def names() -> list[str]:
    """Return the VMs that have a record."""
    return sorted(path.stem for path in runtime.migrate_dir().glob("*.json"))
