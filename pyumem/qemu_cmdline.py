# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU command line as the user wrote it, read and rewritten to one that stock QEMU takes.

Pure: no files, no processes.

The user writes `-postcopy`, `-postcopy-flags 0|1` and `-incoming tcp:HOST:PORT`, which stock QEMU
does not know (or not so), and plain -m and -machine.  Stock QEMU gets RAM on a file of ours, a QMP
socket of ours, and, where a VM is expected, `-incoming defer -S`.  All else stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyumem.address import Address
from pyumem.address import parse as parse_address
from pyumem.errors import UsageError
from pyumem.hello import valid_name
from pyumem.uapi import NAME_MAX

RAM_ID: Final = "ram0"
"""Id of the memory back end; the same on both sides, as QEMU wants it."""
LONGEST_NAME: Final = NAME_MAX - 1 - len(f".{RAM_ID}")
"""Characters of a VM's name: with the back end's id it names an area."""
DEFAULT_SIZE: Final = 128 << 20
"""Bytes of RAM of a QEMU without -m."""

# Options of QEMU 4.2 to 11 that take no argument.  Every other option takes one.
# Tests hold this against `qemu -help`.
_FLAG_WORDS: Final = """
S s alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm
enable-sync-profile full-screen h help jitdump mem-prealloc no-acpi no-fd-bootchk no-frame
no-hpet no-quit no-reboot no-shutdown no-user-config nodefaults nodefconfig nographic old-param
only-migratable perfmap portrait postcopy preconfig rtc-td-hack sdl semihosting singlestep
snapshot usb version win2k-hack xen-attach xen-domid-restrict
"""
_FLAGS: Final = frozenset(_FLAG_WORDS.split())
_OWN_RAM: Final = (
    "RAM belongs to umem-qemu; leave it out.  (A VM that you start yourself with all its RAM on "
    "memory-backend-file,share=on can be migrated away, too.)"
)
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)
_WHOLE: Final = 65536
"""RAM is a multiple of it: umem serves whole pages, which are larger nowhere.  QEMU rounds to
8 KiB.
"""
_UNITS: Final = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command line asks for.  size is bytes of RAM, rounded up to what umem serves; rest is
    every option that stays, in order.
    """

    binary: str
    name: str
    """Empty without -name."""
    size: int
    postcopy_from: Address | None
    """Where to expect the VM by post-copy, None for a QEMU that starts its own."""
    touch_pages: bool
    """-postcopy-flags 1."""
    autostart: bool
    """False when the user gave -S."""
    rest: tuple[tuple[str, ...], ...]


def parse_size(text: str) -> int:
    """Return bytes; QEMU's suffixes, MiB without one.  Raises UsageError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"-m {text}: not a size")
    size = int(float(match[1]) * (1 << _UNITS[(match[2] or "m").lower()]))
    if size <= 0:
        raise UsageError(f"-m {text}: a VM needs RAM")
    return size


def _properties(text: str) -> list[tuple[str, str]]:
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


def split(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """Split a command line, without the binary, into options with their argument.

    Raises UsageError.
    """
    found: list[tuple[str, ...]] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word == "-":
            found.append((word,))
            continue
        option = "-" + word.lstrip("-") if word.startswith("--") else word
        if option[1:] in _FLAGS:
            found.append((option,))
            continue
        argument = next(words, None)
        if argument is None:
            raise UsageError(f"{word}: its argument is missing")
        found.append((option, argument))
    return found


def parse(argv: Sequence[str]) -> Wish:
    """Read a command line.  Raises UsageError for what cannot work together with umem."""
    if not argv:
        raise UsageError("which QEMU?  umem-qemu qemu-system-x86_64 ARGUMENTS...")
    name = flags = ""
    incoming: list[str] = []
    size = DEFAULT_SIZE
    postcopy = False
    autostart = True
    rest = []
    for option in split(argv[1:]):
        match option:
            case ("-postcopy",):
                postcopy = True
                continue
            case ("-postcopy-flags", flags):
                continue
            case ("-incoming", channel):
                incoming.append(channel)
                continue
            case ("-S",):
                autostart = False
                continue
            case ("-m", text):
                size = _ram_size(text, size)
            case ("-name", text):
                name = _guest_name(text)
            case _:
                _refuse(option)
        rest.append(option)
    if flags not in ("", "0", "1"):
        raise UsageError(f"-postcopy-flags {flags}: 0 and 1 are known")
    if (flags or postcopy) and not incoming:
        raise UsageError("-postcopy is for a VM that is expected: it needs -incoming tcp:HOST:PORT")
    if flags and not postcopy:
        raise UsageError("-postcopy-flags needs -postcopy")
    if postcopy:
        if len(incoming) > 1:
            raise UsageError(f"-postcopy takes one -incoming, not {len(incoming)}")
        for option in rest:
            _refuse_expecting(option)
    else:
        rest += [("-incoming", channel) for channel in incoming]
    whole = -(-size // _WHOLE) * _WHOLE
    if whole != size:
        # QEMU wants the size of the back end here, and takes the last one that it reads.
        rest.append(("-m", f"size={whole}b"))
    return Wish(
        binary=argv[0],
        name=name,
        size=whole,
        postcopy_from=parse_address(incoming[0], listening=True) if postcopy else None,
        touch_pages=flags == "1",
        autostart=autostart,
        rest=tuple(rest),
    )


def _ram_size(text: str, before: int) -> int:
    for key, value in _properties(text):
        if key in ("", "size"):
            return parse_size(value)
    return before  # -m slots=2,maxmem=4G


def _guest_name(text: str) -> str:
    for key, value in _properties(text):
        if key in ("", "guest"):
            if not valid_name(value) or len(value) > LONGEST_NAME:
                raise UsageError(
                    f"-name {value}: 1 to {LONGEST_NAME} of letters, digits and '._:+-' are "
                    "allowed here"
                )
            return value
    return ""


def _refuse(option: tuple[str, ...]) -> None:
    """Raise UsageError for an option that cannot work with RAM of ours."""
    text = " ".join(option)
    match option:
        case ("-mem-path", _):
            raise UsageError(f"{text}: {_OWN_RAM}")
        case ("-object", argument):
            properties = dict(reversed(_properties(argument)))
            kind = properties.get("qom-type") or properties.get("", "")
            if kind.startswith("memory-backend") or '"memory-backend' in argument:
                raise UsageError(f"{text}: {_OWN_RAM}")
        case ("-machine" | "-M", argument) if "memory-backend" in dict(_properties(argument)):
            raise UsageError(f"{text}: {_OWN_RAM}")
        case ("-numa", _):
            # A node names its RAM block, by memdev=; QEMU takes none together with a machine's.
            raise UsageError(f"{text}: one RAM block without NUMA nodes, so far; leave it out")
        case ("-daemonize",):
            raise UsageError(
                "-daemonize: umem-qemu stays with its QEMU; put it in the background itself"
            )


def _refuse_expecting(option: tuple[str, ...]) -> None:
    """Raise UsageError for an option that touches all RAM at once, which is not there yet."""
    match option:
        case ("-mem-prealloc",):
            raise UsageError("-mem-prealloc would wait for every page before the VM can arrive")
        case ("-overcommit", argument) if dict(_properties(argument)).get("mem-lock") not in (
            None,
            "off",
        ):
            raise UsageError(
                "-overcommit mem-lock would wait for every page before the VM can arrive"
            )
        case ("-loadvm", _):
            raise UsageError("-loadvm and -postcopy exclude each other")


def _escaped(path: str) -> str:
    return path.replace(",", ",,")


def rewrite(wish: Wish, *, name: str, mem_path: str, qmp_path: str) -> list[str]:
    """Return the command line for stock QEMU: RAM on mem_path, QMP at qmp_path."""
    options = [list(option) for option in wish.rest]
    machines = [option for option in options if option[0] in ("-machine", "-M")]
    if machines:
        machines[-1][1] += f",memory-backend={RAM_ID}"
    else:
        options.append(["-machine", f"memory-backend={RAM_ID}"])
    backend = (
        f"memory-backend-file,id={RAM_ID},mem-path={_escaped(mem_path)},share=on,size={wish.size}"
    )
    options.append(["-object", backend])
    options.append(["-qmp", f"unix:{_escaped(qmp_path)},server=on,wait=off"])
    if not wish.name:
        options.append(["-name", name])
    if wish.postcopy_from:
        options.append(["-incoming", "defer"])
    if wish.postcopy_from or not wish.autostart:
        options.append(["-S"])
    return [wish.binary, *(word for option in options for word in option)]
