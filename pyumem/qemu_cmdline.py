# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU command line as the user wrote it, read and rewritten to one that stock QEMU takes.

Pure: no files, no processes.

The user writes `-postcopy`, `-postcopy-flags 0|1` and `-incoming tcp:HOST:PORT`, which stock QEMU
does not know (or not so), and plain -m and -machine, or memory back ends of any kind.  Stock QEMU
gets all RAM on files of ours, a QMP socket of ours, and, where a VM is expected, `-incoming defer
-S`.  All else stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pyumem.address import Address
from pyumem.address import parse as parse_address
from pyumem.errors import UsageError
from pyumem.hello import MAX_AREAS, valid_name
from pyumem.qemu_backends import WHOLE, Backend, escaped, properties, read, size_of
from pyumem.uapi import NAME_MAX

RAM_ID: Final = "ram0"
"""Id of the memory back end of a VM for which the user named none; the same on both sides, as QEMU
wants it.
"""
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
_WOULD_WAIT: Final = "would wait for every page before the VM can arrive"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command line asks for.  rest is every option that stays, in order."""

    binary: str
    name: str
    """Empty without -name."""
    blocks: tuple[Backend, ...]
    """All RAM.  What umem-qemu adds, as RAM_ID, has a size that is rounded up to what umem serves.
    """
    own_ram: bool
    """RAM_ID is among them, and the machine is to be told."""
    postcopy_from: Address | None
    """Where to expect the VM by post-copy, None for a QEMU that starts its own."""
    touch_pages: bool
    """-postcopy-flags 1."""
    autostart: bool
    """False when the user gave -S."""
    rest: tuple[tuple[str, ...], ...]


def parse_size(text: str) -> int:
    """Return bytes; QEMU's suffixes, MiB without one.  Raises UsageError."""
    return size_of(text, f"-m {text}", "m")


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
    name = flags = mem_path = ""
    incoming: list[str] = []
    blocks: list[Backend] = []
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
            case ("-mem-path", mem_path):
                continue
            case ("-object", argument) if block := read(argument):
                blocks.append(block)
                continue
            case ("-m", text):
                size = _ram_size(text, size)
            case ("-name", text):
                name = _guest_name(text)
            case ("-daemonize",):
                raise UsageError(
                    "-daemonize: umem-qemu stays with its QEMU; put it in the background itself"
                )
        rest.append(option)
    if flags not in ("", "0", "1"):
        raise UsageError(f"-postcopy-flags {flags}: 0 and 1 are known")
    if (flags or postcopy) and not incoming:
        raise UsageError("-postcopy is for a VM that is expected: it needs -incoming tcp:HOST:PORT")
    if flags and not postcopy:
        raise UsageError("-postcopy-flags needs -postcopy")
    if own_ram := not _names_its_ram(rest, blocks):
        whole = -(-size // WHOLE) * WHOLE
        blocks.append(Backend(RAM_ID, whole, mem_path))
        if whole != size:
            # QEMU wants the size of the back end here, and takes the last one that it reads.
            rest.append(("-m", f"size={whole}b"))
    elif mem_path:
        raise UsageError(f"-mem-path {mem_path}: all RAM is in memory back ends of yours")
    _check_blocks(blocks, name)
    if postcopy:
        if len(incoming) > 1:
            raise UsageError(f"-postcopy takes one -incoming, not {len(incoming)}")
        for option in rest:
            _refuse_expecting(option)
        for block in blocks:
            if block.preallocated:
                raise UsageError(f"-object {block.text}: prealloc {_WOULD_WAIT}")
    else:
        rest += [("-incoming", channel) for channel in incoming]
    return Wish(
        binary=argv[0],
        name=name,
        blocks=tuple(blocks),
        own_ram=own_ram,
        postcopy_from=parse_address(incoming[0], listening=True) if postcopy else None,
        touch_pages=flags == "1",
        autostart=autostart,
        rest=tuple(rest),
    )


def _names_its_ram(options: Sequence[tuple[str, ...]], blocks: Sequence[Backend]) -> bool:
    """Tell whether the machine's RAM is memory back ends of the user's.

    Raises UsageError for one that is not there.
    """
    named = []
    for option in options:
        match option:
            case ("-machine" | "-M", argument):
                named += [value for key, value in properties(argument) if key == "memory-backend"]
            case ("-numa", argument):
                named += [value for key, value in properties(argument) if key == "memdev"]
    for block_id in named:
        if block_id not in {block.id for block in blocks}:
            raise UsageError(f"memory back end {block_id}: there is no -object of that id")
    return bool(named)


def _check_blocks(blocks: Sequence[Backend], name: str) -> None:
    """Raise UsageError for RAM blocks of which umem cannot make areas."""
    ids = [block.id for block in blocks]
    if len(ids) > MAX_AREAS:
        raise UsageError(f"{len(ids)} memory back ends; {MAX_AREAS} can be served")
    for block_id in ids:
        if ids.count(block_id) > 1:
            raise UsageError(f"memory back end {block_id}: the id is taken, use another")
        if len(f"{name}.{block_id}") >= NAME_MAX:
            raise UsageError(
                f"memory back end {block_id}: with -name it has {len(f'{name}.{block_id}')} "
                f"characters, {NAME_MAX - 1} are allowed"
            )


def _ram_size(text: str, before: int) -> int:
    for key, value in properties(text):
        if key in ("", "size"):
            return parse_size(value)
    return before  # -m slots=2,maxmem=4G


def _guest_name(text: str) -> str:
    for key, value in properties(text):
        if key in ("", "guest"):
            if not valid_name(value) or len(value) > LONGEST_NAME:
                raise UsageError(
                    f"-name {value}: 1 to {LONGEST_NAME} of letters, digits and '._:+-' are "
                    "allowed here"
                )
            return value
    return ""


def _refuse_expecting(option: tuple[str, ...]) -> None:
    """Raise UsageError for an option that touches all RAM at once, which is not there yet."""
    match option:
        case ("-mem-prealloc",):
            raise UsageError(f"-mem-prealloc {_WOULD_WAIT}")
        case ("-overcommit", argument) if dict(properties(argument)).get("mem-lock") not in (
            None,
            "off",
        ):
            raise UsageError(f"-overcommit mem-lock {_WOULD_WAIT}")
        case ("-loadvm", _):
            raise UsageError("-loadvm and -postcopy exclude each other")


def rewrite(wish: Wish, *, name: str, paths: Mapping[str, str], qmp_path: str) -> list[str]:
    """Return the command line for stock QEMU: QMP at qmp_path, and each RAM block on the file that
    paths has for its id.  One without a path stays as the user wrote it.
    """
    options = [list(option) for option in wish.rest]
    if wish.own_ram:
        machines = [option for option in options if option[0] in ("-machine", "-M")]
        if machines:
            machines[-1][1] += f",memory-backend={RAM_ID}"
        else:
            options.append(["-machine", f"memory-backend={RAM_ID}"])
    for block in wish.blocks:
        argument = block.on(paths[block.id]) if block.id in paths else block.text
        assert argument is not None
        options.append(["-object", argument])
    options.append(["-qmp", f"unix:{escaped(qmp_path)},server=on,wait=off"])
    if not wish.name:
        options.append(["-name", name])
    if wish.postcopy_from:
        options.append(["-incoming", "defer"])
    if wish.postcopy_from or not wish.autostart:
        options.append(["-S"])
    return [wish.binary, *(word for option in options for word in option)]
