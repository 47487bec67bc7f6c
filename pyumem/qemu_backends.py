# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's memory back ends as a user's `-object` options have them, and as they have to be for umem.

Pure: no files, no processes.

Whatever kind the user named, stock QEMU gets a memory-backend-file with share=on, on a file that
umem-qemu or `umemctl serve` made; what says nothing of the file stays (host-nodes, policy, merge,
dump, reserve, ...).  The id stays too: by it both ends of a migration know the RAM block, and a
`-numa node,memdev=` or `-device pc-dimm,memdev=` its memory.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

from pyumem.errors import UsageError
from pyumem.hello import valid_name

WHOLE: Final = 65536
"""RAM is a multiple of it: umem serves whole pages, which are larger nowhere."""
_KINDS: Final = ("memory-backend-file", "memory-backend-memfd", "memory-backend-ram")
_OURS: Final = frozenset({"", "qom-type", "id", "size", "share", "mem-path"})
_OF_A_FILE: Final = frozenset(
    {"align", "discard-data", "hugetlb", "hugetlbsize", "offset", "pmem", "readonly", "rom", "seal"}
)
"""They describe the file that ours takes the place of."""
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)
_HEX: Final = re.compile(r"0x[0-9a-f]+", re.IGNORECASE)
_UNITS: Final = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def size_of(text: str, what: str, unit: str) -> int:
    """Return bytes: QEMU's suffixes, or `unit` without one.

    Raises UsageError, which begins with `what`.
    """
    match = _SIZE.fullmatch(text)
    if match:
        size = int(float(match[1]) * (1 << _UNITS[(match[2] or unit).lower()]))
    elif unit == "b" and _HEX.fullmatch(text):
        size = int(text, 16)
    else:
        raise UsageError(f"{what}: not a size")
    if size <= 0:
        raise UsageError(f"{what}: a VM needs RAM")
    return size


def properties(text: str) -> list[tuple[str, str]]:
    """Split QEMU's key=value,key=value; a doubled comma stands for one.

    A first word without = has the key "".
    """
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    found = []
    for at, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if equals:
            found.append((key, value))
        else:
            found.append(("", part) if not at else (part, "on"))
    return found


def escaped(text: str) -> str:
    """Return it as a value of key=value,key=value."""
    return text.replace(",", ",,")


def is_on(value: object) -> bool:
    """Read a boolean as QEMU writes it, in JSON or as text."""
    return value is True or value in ("on", "yes", "true", "y")


@dataclass(frozen=True, slots=True)
class Backend:
    """One RAM block.  size is bytes."""

    id: str
    size: int
    mem_path: str = ""
    """The user's file or directory, empty without."""
    keeps_file: bool = False
    """It is a shared file of the user's, if mem_path is no directory: it can stay what it is."""
    kept: tuple[tuple[str, object], ...] = ()
    """What stays of the user's properties."""
    text: str | None = None
    """The user's words, None for a back end that is none of the user's."""

    @property
    def preallocated(self) -> bool:
        """Tell whether QEMU would touch all of it at its start."""
        return is_on(dict(self.kept).get("prealloc"))

    @property
    def in_json(self) -> bool:
        """Tell whether the user wrote it in JSON."""
        return self.text is not None and self.text.startswith("{")

    def on(self, path: str) -> str:
        """Return the argument of -object that has it on this file."""
        if self.in_json:
            ours = {"qom-type": "memory-backend-file", "id": self.id, "mem-path": path}
            return json.dumps({**ours, "share": True, "size": self.size, **dict(self.kept)})
        ours_text = (
            f"memory-backend-file,id={self.id},mem-path={escaped(path)},share=on,size={self.size}"
        )
        return ours_text + "".join(f",{key}={escaped(str(value))}" for key, value in self.kept)


def read(argument: str) -> Backend | None:
    """Read an argument of -object; None for one that is no memory.  Raises UsageError."""
    pairs: list[tuple[str, object]]
    if argument.startswith("{"):
        try:
            pairs = list(json.loads(argument).items())
        except ValueError:
            return None  # QEMU's to complain of
    else:
        pairs = list(properties(argument))
    found = dict(reversed(pairs)) if not argument.startswith("{") else dict(pairs)
    kind = str(found.get("qom-type") or found.get("", ""))
    if not kind.startswith("memory-backend"):
        return None
    what = f"-object {argument}"
    if kind not in _KINDS:
        raise UsageError(f"{what}: {kind} cannot be on a shared file")
    block_id = str(found.get("id", ""))
    if not valid_name(block_id):
        raise UsageError(f"{what}: it needs an id")
    if is_on(found.get("hugetlb")):
        raise UsageError(
            f"{what}: huge pages without a file; use memory-backend-file,mem-path= and a directory "
            "of a hugetlbfs"
        )
    size = size_of(str(found.get("size", "")), what, "b")
    if size % WHOLE:
        raise UsageError(f"{what}: its size has to be a multiple of {WHOLE >> 10} KiB")
    mem_path = str(found.get("mem-path", "")) if kind == "memory-backend-file" else ""
    return Backend(
        id=block_id,
        size=size,
        mem_path=mem_path,
        keeps_file=bool(mem_path) and is_on(found.get("share")),
        kept=tuple((key, value) for key, value in pairs if key not in _OURS | _OF_A_FILE),
        text=argument,
    )
