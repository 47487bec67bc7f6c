# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's ioctls and structures, and nothing else: the one file that knows
kmod/include/uapi/linux/umem.h.

It holds no policy and no state of an area.  Numbers are computed the way <linux/ioctl.h> does it;
tests/unit/test_uapi.py compares them, and every size and offset, with what a C compiler makes of
the header.

Every function loops on EINTR (the ioctl functions of Python do not before 3.14), so that a signal
handler of Python's runs and the call goes on, and turns OSError into errors.DriverError.  `area` is
only text for that error.
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyumem.errors import DriverError

DEVICE: Final = "/dev/umem"
PAGE_SIZE: Final = mmap.PAGESIZE

# --- <linux/ioctl.h>, the generic layout of x86, arm64, riscv and s390 ---

_IOC_WRITE: Final = 1
_IOC_READ: Final = 2
_IOC_NRBITS: Final = 8
_IOC_TYPEBITS: Final = 8
_IOC_SIZEBITS: Final = 14


def _ioc(direction: int, magic: int, nr: int, size: int) -> int:
    """Compose an ioctl number from its fields; size is in bytes."""
    if size >= 1 << _IOC_SIZEBITS:
        raise ValueError(f"an ioctl argument of {size} bytes does not fit the number's size field")
    number = direction
    for value, bits in ((size, _IOC_SIZEBITS), (magic, _IOC_TYPEBITS), (nr, _IOC_NRBITS)):
        number = number << bits | value
    return number


def _ior(magic: int, nr: int, size: int) -> int:
    return _ioc(_IOC_READ, magic, nr, size)


def _iow(magic: int, nr: int, size: int) -> int:
    return _ioc(_IOC_WRITE, magic, nr, size)


def _io(magic: int, nr: int) -> int:
    return _ioc(0, magic, nr, 0)


def _iowr(magic: int, nr: int, size: int) -> int:
    return _ioc(_IOC_READ | _IOC_WRITE, magic, nr, size)


# --- structures ---

MAGIC: Final = 0x1E
NAME_MAX: Final = 64
"""Bytes of a name, its NUL included."""
MARK_MAX: Final = 4096
"""Most ranges of one UMEM_MARK_PAGE_CACHED."""
GRANULE_MAX: Final = 2 << 20
"""Largest granule in bytes."""
LATENCY_BUCKETS: Final = 24


class Layout:
    """A C structure without padding: its members in order, each with its struct format."""

    def __init__(self, tag: str, members: tuple[tuple[str, str], ...]) -> None:
        """Lay out `members`; none of them may need padding before it."""
        self.tag = tag
        self.members = members
        # "=": sizes as the kernel's __u32 and so on, native byte order, no padding of struct's own.
        self._struct = struct.Struct("=" + "".join(fmt for _, fmt in members))
        self.size: Final[int] = self._struct.size

    def offsets(self) -> Iterator[tuple[str, int, int]]:
        """Yield (member, offset, size), both in bytes."""
        offset = 0
        for name, fmt in self.members:
            size = struct.calcsize("=" + fmt)
            yield name, offset, size
            offset += size

    def pack(self, **values: int | bytes) -> bytearray:
        """Return the structure with the given members set and all others zero."""
        unknown = values.keys() - {name for name, _ in self.members}
        if unknown:
            raise ValueError(f"struct {self.tag} has no {', '.join(sorted(unknown))}")
        fields = [
            values.get(name, b"" if fmt.endswith("s") else 0)
            for name, fmt in self.members
            if not fmt.endswith("x")
        ]
        buf = bytearray(self.size)
        self._struct.pack_into(buf, 0, *fields)
        return buf

    def ints(self, buf: bytearray) -> dict[str, int]:
        """Return the integer members."""
        return {k: v for k, v in self._items(buf) if isinstance(v, int)}

    def name(self, buf: bytearray) -> str:
        """Return the member `name` up to its NUL."""
        raw = next(v for k, v in self._items(buf) if k == "name")
        assert isinstance(raw, bytes)
        return raw.split(b"\0", 1)[0].decode("ascii", "backslashreplace")

    def _items(self, buf: bytearray) -> Iterator[tuple[str, int | bytes]]:
        names = [name for name, fmt in self.members if not fmt.endswith("x")]
        return zip(names, self._struct.unpack_from(buf), strict=True)


INIT: Final = Layout("umem_init", (("size", "Q"), ("shmem_fd", "i"), ("padding", "i")))
CREATE: Final = Layout(
    "umem_create",
    (
        ("size", "Q"),
        ("flags", "I"),
        ("granule_size", "I"),
        ("server_fd", "i"),
        ("shmem_fd", "i"),
        ("id", "I"),
        ("loss_timeout_ms", "I"),
        ("reserved", "16x"),
        ("name", f"{NAME_MAX}s"),
    ),
)
INFO: Final = Layout(
    "umem_info",
    (
        ("size", "Q"),
        ("nr_cached", "Q"),
        ("nr_delivered", "Q"),
        ("id", "I"),
        ("flags", "I"),
        ("granule_size", "I"),
        ("owner_uid", "I"),
        ("server_pid", "i"),
        ("loss_timeout_ms", "I"),
        ("reserved", "16x"),
        ("name", f"{NAME_MAX}s"),
    ),
)
LIST: Final = Layout(
    "umem_list",
    (("infos", "Q"), ("nr", "I"), ("first_id", "I"), ("total", "I"), ("reserved", "12x")),
)
REATTACH: Final = Layout(
    "umem_reattach",
    (
        ("size", "Q"),
        ("id", "I"),
        ("flags", "I"),
        ("granule_size", "I"),
        ("server_fd", "i"),
        ("shmem_fd", "i"),
        ("reserved", "20x"),
    ),
)
PAGE_REQUEST: Final = Layout("umem_page_request", (("pgoff", "Q"), ("flags", "Q")))
PAGE_REQUESTS: Final = Layout(
    "umem_page_requests", (("requests", "Q"), ("nr", "I"), ("reserved", "4x"))
)
PAGE_RANGE: Final = Layout("umem_page_range", (("pgoff", "Q"), ("count", "Q")))
MARK_CACHED: Final = Layout(
    "umem_mark_cached", (("ranges", "Q"), ("nr", "I"), ("flags", "I"), ("nr_new", "Q"))
)
LOSS_POLICY: Final = Layout("umem_loss_policy", (("timeout_ms", "I"), ("reserved", "4x")))
BITMAP: Final = Layout(
    "umem_bitmap",
    (("words", "Q"), ("first", "Q"), ("nr_words", "I"), ("which", "I"), ("reserved", "8x")),
)
_COUNTERS: Final = (
    "nr_minor",
    "nr_major",
    "nr_async",
    "nr_duplicate",
    "nr_killed",
    "nr_lost",
    "nr_poison_hits",
    "nr_requested",
    "nr_delivered",
    "nr_cached",
    "nr_poisoned",
    "nr_discarded",
    "nr_touched",
    "nr_logged",
    "blocked_ns",
)
STATS: Final = Layout(
    "umem_stats",
    (
        *((name, "Q") for name in _COUNTERS),
        ("latency", f"{8 * LATENCY_BUCKETS}s"),
        ("reserved", "8x"),
    ),
)
DIRTY_LOG: Final = Layout("umem_dirty_log", (("on", "I"), ("reserved", "4x")))
DIRTY: Final = Layout(
    "umem_dirty",
    (("words", "Q"), ("first", "Q"), ("nr_words", "I"), ("flags", "I"), ("nr_dirty", "Q")),
)
LAYOUTS: Final = (
    INIT,
    CREATE,
    INFO,
    LIST,
    REATTACH,
    PAGE_REQUEST,
    PAGE_REQUESTS,
    PAGE_RANGE,
    MARK_CACHED,
    LOSS_POLICY,
    BITMAP,
    STATS,
    DIRTY_LOG,
    DIRTY,
)

UMEM_INIT: Final = _iowr(MAGIC, 0, INIT.size)
UMEM_DEV_CREATE_UMEM: Final = _iowr(MAGIC, 1, CREATE.size)
UMEM_DEV_LIST: Final = _iowr(MAGIC, 2, LIST.size)
UMEM_DEV_REATTACH: Final = _iowr(MAGIC, 3, REATTACH.size)
UMEM_GET_PAGE_REQUEST: Final = _iowr(MAGIC, 16, PAGE_REQUESTS.size)
UMEM_MARK_PAGE_CACHED: Final = _iowr(MAGIC, 17, MARK_CACHED.size)
UMEM_GET_INFO: Final = _ior(MAGIC, 18, INFO.size)
UMEM_SET_LOSS_POLICY: Final = _iow(MAGIC, 19, LOSS_POLICY.size)
UMEM_MARK_PAGE_POISONED: Final = _iowr(MAGIC, 20, MARK_CACHED.size)
UMEM_GET_BITMAP: Final = _iow(MAGIC, 21, BITMAP.size)
UMEM_MAKE_VMA_ANONYMOUS: Final = _io(MAGIC, 22)
UMEM_GET_STATS: Final = _ior(MAGIC, 23, STATS.size)
UMEM_SET_DIRTY_LOG: Final = _iow(MAGIC, 24, DIRTY_LOG.size)
UMEM_GET_DIRTY: Final = _iowr(MAGIC, 25, DIRTY.size)

UMEM_CREATE_HUGE: Final = 1 << 0

UMEM_INFO_SERVED: Final = 1 << 0
UMEM_INFO_COMPLETE: Final = 1 << 1
UMEM_INFO_MAPPED: Final = 1 << 2
UMEM_INFO_NODE: Final = 1 << 3
UMEM_INFO_HUGE: Final = 1 << 4

UMEM_REATTACH_FORCE: Final = 1 << 0

UMEM_DIRTY_PEEK: Final = 1 << 0

UMEM_REQUEST_ASYNC: Final = 1 << 0
UMEM_REQUEST_DISCARDED: Final = 1 << 1

UMEM_MARK_TOUCH: Final = 1 << 0

UMEM_BITMAP_CACHED: Final = 0
UMEM_BITMAP_REQUESTED: Final = 1
UMEM_BITMAP_POISONED: Final = 2

# --- results ---


@dataclass(frozen=True, slots=True)
class UmemInit:
    """What UMEM_INIT gave: size in bytes, rounded up to the page; the caller owns shmem_fd."""

    size: int
    shmem_fd: int


@dataclass(frozen=True, slots=True)
class Created:
    """An area that was created or re-attached.  Sizes are in bytes; the caller owns both
    descriptors.
    """

    id: int
    size: int
    granule_size: int
    server_fd: int
    shmem_fd: int


@dataclass(frozen=True, slots=True)
class AreaInfo:
    """What the driver knows of an area.  size and granule_size are bytes, nr_cached granules,
    nr_delivered requests.
    """

    id: int
    name: str
    size: int
    granule_size: int
    nr_cached: int
    nr_delivered: int
    flags: int
    owner_uid: int
    server_pid: int
    loss_timeout_ms: int

    @property
    def served(self) -> bool:
        """Tell whether the area has a server."""
        return bool(self.flags & UMEM_INFO_SERVED)

    @property
    def complete(self) -> bool:
        """Tell whether every granule is cached."""
        return bool(self.flags & UMEM_INFO_COMPLETE)

    @property
    def mapped(self) -> bool:
        """Tell whether at least one mapping exists for which the driver answers."""
        return bool(self.flags & UMEM_INFO_MAPPED)

    @property
    def has_node(self) -> bool:
        """Tell whether there is a /dev/umemN (not for an area of UMEM_INIT)."""
        return bool(self.flags & UMEM_INFO_NODE)

    @property
    def huge(self) -> bool:
        """Tell whether it was made to be backed by huge pages."""
        return bool(self.flags & UMEM_INFO_HUGE)

    @property
    def nr_granules(self) -> int:
        """Return the area's size in granules."""
        return self.size // self.granule_size


@dataclass(frozen=True, slots=True)
class AreaStats:
    """What has happened in an area: see struct umem_stats.

    Counts are of faults, requests, granules (nr_cached, nr_poisoned, nr_logged) and pages
    (nr_discarded, nr_touched); blocked_ns is nanoseconds.  latency[i] counts waits from 2**i up to
    2**(i+1) microseconds, the first one also shorter ones and the last one longer ones.
    """

    nr_minor: int
    nr_major: int
    nr_async: int
    nr_duplicate: int
    nr_killed: int
    nr_lost: int
    nr_poison_hits: int
    nr_requested: int
    nr_delivered: int
    nr_cached: int
    nr_poisoned: int
    nr_discarded: int
    nr_touched: int
    nr_logged: int
    blocked_ns: int
    latency: tuple[int, ...]


# --- calls ---


def _call(fd: int, number: int, arg: bytearray) -> None:
    """Do the ioctl, again after each signal.  Raises OSError.

    Other threads run meanwhile: Python lets go of its interpreter lock for an argument of up to
    1024 bytes (and from 3.13 on for any).
    """
    while True:
        try:
            fcntl.ioctl(fd, number, arg)
            return
        except InterruptedError:
            continue


def open_control(path: str = DEVICE) -> int:
    """Open the control node and return its descriptor.

    Raises DriverError: ENOENT when the driver is not loaded, EACCES when the node's permissions do
    not allow it.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        hint = " (is umem.ko loaded?)" if e.errno in (errno.ENOENT, errno.ENXIO) else ""
        raise DriverError(f"open {path}{hint}", e.errno or errno.EIO) from e


def init(fd: int, size: int) -> UmemInit:
    """Make the open /dev/umem an area of its own (the interface of 2012).  size in bytes."""
    arg = INIT.pack(size=size, shmem_fd=-1)
    try:
        _call(fd, UMEM_INIT, arg)
    except OSError as e:
        raise DriverError(f"UMEM_INIT of {size} bytes", e.errno or errno.EIO) from e
    got = INIT.ints(arg)
    return UmemInit(got["size"], got["shmem_fd"])


def create(
    fd: int,
    name: str,
    size: int,
    *,
    granule_size: int = 0,
    flags: int = 0,
    loss_timeout_ms: int = 0,
) -> Created:
    """Create the named area.  size in bytes; granule_size in bytes, 0 for the host page;
    loss_timeout_ms as in set_loss_policy().

    Raises DriverError: EEXIST (name in use), EINVAL (name, size, flags, granule), EOPNOTSUPP (no
    huge pages here), EDQUOT (too much memory for this user), EMFILE, ENFILE, ENOMEM, ENOSPC.
    """
    raw = name.encode()
    if len(raw) > NAME_MAX:
        # struct would cut it silently; a full array without its NUL is left to the driver to
        # refuse.
        raise DriverError("create: name too long", errno.EINVAL, area=name)
    arg = CREATE.pack(
        size=size,
        granule_size=granule_size,
        flags=flags,
        loss_timeout_ms=loss_timeout_ms,
        name=raw,
    )
    try:
        _call(fd, UMEM_DEV_CREATE_UMEM, arg)
    except OSError as e:
        raise DriverError(f"create, {size} bytes", e.errno or errno.EIO, area=name) from e
    got = CREATE.ints(arg)
    return Created(got["id"], got["size"], got["granule_size"], got["server_fd"], got["shmem_fd"])


def reattach(fd: int, area_id: int, force: bool = False) -> Created:
    """Become the server of an area that lost its own, or with force also of one that has not.

    Raises DriverError: ENOENT (no such area), EPERM, EBUSY (it has a server), EMFILE, ENFILE,
    ENOMEM.
    """
    arg = REATTACH.pack(id=area_id, flags=UMEM_REATTACH_FORCE if force else 0)
    try:
        _call(fd, UMEM_DEV_REATTACH, arg)
    except OSError as e:
        raise DriverError("re-attach", e.errno or errno.EIO, area=f"umem{area_id}") from e
    got = REATTACH.ints(arg)
    return Created(got["id"], got["size"], got["granule_size"], got["server_fd"], got["shmem_fd"])


def _area_info(buf: bytearray) -> AreaInfo:
    got = INFO.ints(buf)
    return AreaInfo(
        id=got["id"],
        name=INFO.name(buf),
        size=got["size"],
        granule_size=got["granule_size"],
        nr_cached=got["nr_cached"],
        nr_delivered=got["nr_delivered"],
        flags=got["flags"],
        owner_uid=got["owner_uid"],
        server_pid=got["server_pid"],
        loss_timeout_ms=got["loss_timeout_ms"],
    )


def info(fd: int, area: str = "") -> AreaInfo:
    """Describe the area behind a server's descriptor.  Raises DriverError: ENODEV (fenced), ENXIO
    (before UMEM_INIT).
    """
    arg = INFO.pack()
    try:
        _call(fd, UMEM_GET_INFO, arg)
    except OSError as e:
        raise DriverError("UMEM_GET_INFO", e.errno or errno.EIO, area=area) from e
    return _area_info(arg)


def set_loss_policy(fd: int, timeout_ms: int, area: str = "") -> None:
    """Choose what becomes of consumers when the server is gone: SIGBUS after so many
    milliseconds, or with 0 they wait.  Raises DriverError.
    """
    try:
        _call(fd, UMEM_SET_LOSS_POLICY, LOSS_POLICY.pack(timeout_ms=timeout_ms))
    except OSError as e:
        raise DriverError("UMEM_SET_LOSS_POLICY", e.errno or errno.EIO, area=area) from e


def make_vma_anonymous(fd: int, area: str = "") -> None:
    """Turn the mappings of a complete area into plain shared memory.  Raises DriverError: EBUSY
    (a granule is missing), EAGAIN (call again), ENOMEM.
    """
    try:
        while True:
            try:
                fcntl.ioctl(fd, UMEM_MAKE_VMA_ANONYMOUS)
                return
            except InterruptedError:
                continue
    except OSError as e:
        raise DriverError("UMEM_MAKE_VMA_ANONYMOUS", e.errno or errno.EIO, area=area) from e


def stats(fd: int, area: str = "") -> AreaStats:
    """Read the counters of the area behind a server's descriptor.  Raises DriverError."""
    arg = STATS.pack()
    try:
        _call(fd, UMEM_GET_STATS, arg)
    except OSError as e:
        raise DriverError("UMEM_GET_STATS", e.errno or errno.EIO, area=area) from e
    at = next(offset for name, offset, _ in STATS.offsets() if name == "latency")
    latency = struct.unpack_from(f"={LATENCY_BUCKETS}Q", arg, at)
    return AreaStats(**STATS.ints(arg), latency=latency)


def bitmap(fd: int, which: int, nr_granules: int, area: str = "") -> array.array[int]:
    """Read the whole bitmap UMEM_BITMAP_... of an area: bit b of word w stands for granule
    64 * w + b.  Raises DriverError.
    """
    words = array.array("Q", bytes(8 * ((nr_granules + 63) // 64)))
    arg = BITMAP.pack(words=words.buffer_info()[0], nr_words=len(words), which=which)
    try:
        _call(fd, UMEM_GET_BITMAP, arg)
    except OSError as e:
        raise DriverError("UMEM_GET_BITMAP", e.errno or errno.EIO, area=area) from e
    return words


def set_dirty_log(fd: int, on: bool, area: str = "") -> None:
    """Have the driver note what consumers write to from now on, or not any more.

    Raises DriverError: EBUSY (it does already), EAGAIN (a mapping is just being made: call again),
    ENOMEM.
    """
    try:
        _call(fd, UMEM_SET_DIRTY_LOG, DIRTY_LOG.pack(on=int(on)))
    except OSError as e:
        raise DriverError("UMEM_SET_DIRTY_LOG", e.errno or errno.EIO, area=area) from e


class DirtyBuffer:
    """Room for the log of writes of a whole area, used again for every reading."""

    def __init__(self, nr_granules: int, area: str = "") -> None:
        """Make room for so many granules."""
        self.words = array.array("Q", bytes(8 * ((nr_granules + 63) // 64)))
        self._area = area

    def read(self, fd: int, *, clear: bool = True, first: int = 0, nr: int | None = None) -> int:
        """Read the log of `nr` granules from `first` on, multiples of 64, or of all: bit b of word
        w stands for granule 64 * w + b.

        What is read is cleared, unless that is not wanted.  Returns how many granules it has.
        Raises DriverError: ENODATA (the log is off), ENOMEM.
        """
        at = first // 64
        nr_words = len(self.words) - at if nr is None else (nr + 63) // 64
        arg = DIRTY.pack(
            words=self.words.buffer_info()[0] + 8 * at,
            first=first,
            nr_words=nr_words,
            flags=0 if clear else UMEM_DIRTY_PEEK,
        )
        try:
            _call(fd, UMEM_GET_DIRTY, arg)
        except OSError as e:
            raise DriverError("UMEM_GET_DIRTY", e.errno or errno.EIO, area=self._area) from e
        return DIRTY.ints(arg)["nr_dirty"]


def list_areas(fd: int, *, room: int = 64) -> list[AreaInfo]:
    """List the areas that are alive, by id; `room` is how many are asked for at a time."""
    found: list[AreaInfo] = []
    first_id = 0
    while True:
        some, total = _list_from(fd, first_id, room)
        found += some
        if total <= len(some) or not some:
            return found
        first_id = found[-1].id + 1


def area_info(fd: int, area_id: int) -> AreaInfo:
    """Return what the driver knows of an area.  Raises DriverError, ENODEV when there is none."""
    found, _ = _list_from(fd, area_id, 1)
    if not found or found[0].id != area_id:
        raise DriverError("UMEM_DEV_LIST", errno.ENODEV, area=f"umem{area_id}")
    return found[0]


def _list_from(fd: int, first_id: int, room: int) -> tuple[list[AreaInfo], int]:
    """Return up to `room` areas from an id on, and how many there are from it on."""
    # Whole words, so that array.buffer_info() tells the address without ctypes.
    infos = array.array("Q", bytes(INFO.size * room))
    arg = LIST.pack(infos=infos.buffer_info()[0], nr=room, first_id=first_id)
    try:
        _call(fd, UMEM_DEV_LIST, arg)
    except OSError as e:
        raise DriverError(f"UMEM_DEV_LIST from id {first_id}", e.errno or errno.EIO) from e
    got = LIST.ints(arg)
    raw = memoryview(infos).cast("B")
    found = [
        _area_info(bytearray(raw[n * INFO.size : (n + 1) * INFO.size])) for n in range(got["nr"])
    ]
    return found, got["total"]


class RequestBuffer:
    """Room for requests of one server, used again for every call, so that nothing is allocated per
    request.
    """

    def __init__(self, nr: int, area: str = "") -> None:
        """Make room for nr requests, at least one."""
        if nr < 1:
            raise ValueError("a request buffer needs room for one request at least")
        self.nr = nr
        self._area = area
        self._words = array.array("Q", bytes(PAGE_REQUEST.size * nr))
        self._view = memoryview(self._words)
        # Packed once; only nr changes, in both directions.
        self._arg = PAGE_REQUESTS.pack(requests=self._words.buffer_info()[0], nr=nr)
        self._nr_at = next(at for name, at, _ in PAGE_REQUESTS.offsets() if name == "nr")

    def get(self, fd: int) -> memoryview:
        """Return the next requests as 64-bit words: pgoff, flags, pgoff, flags, ...

        Sleeps until there is one; of a descriptor with O_NONBLOCK it returns an empty view instead.
        The view is valid until the next get().  Raises DriverError: ENODEV (fenced by another
        server), ENXIO (before UMEM_INIT).
        """
        struct.pack_into("=I", self._arg, self._nr_at, self.nr)
        try:
            _call(fd, UMEM_GET_PAGE_REQUEST, self._arg)
        except BlockingIOError:
            return self._view[:0]
        except OSError as e:
            raise DriverError("UMEM_GET_PAGE_REQUEST", e.errno or errno.EIO, area=self._area) from e
        (nr,) = struct.unpack_from("=I", self._arg, self._nr_at)
        return self._view[: 2 * nr]


class MarkBuffer:
    """Ranges that are to be marked cached, gathered so that one call takes many."""

    def __init__(self, nr: int = MARK_MAX, area: str = "") -> None:
        """Make room for nr ranges, 1..MARK_MAX."""
        if not 1 <= nr <= MARK_MAX:
            raise ValueError(f"a mark buffer holds 1..{MARK_MAX} ranges, not {nr}")
        self.nr = nr
        self._area = area
        self._words = array.array("Q", bytes(PAGE_RANGE.size * nr))
        self._used = 0
        self._address = self._words.buffer_info()[0]

    def __len__(self) -> int:
        """Return how many ranges wait for flush()."""
        return self._used

    @property
    def full(self) -> bool:
        """Tell whether add() needs a flush() first."""
        return self._used == self.nr

    def add(self, pgoff: int, count: int) -> None:
        """Add a range, in pages.  One that goes on where the last one ended is joined to it.
        BufferError when full.
        """
        words, at = self._words, 2 * self._used
        if at and words[at - 2] + words[at - 1] == pgoff:
            words[at - 1] += count
            return
        if self._used == self.nr:
            raise BufferError("mark buffer full: flush() it first")
        words[at] = pgoff
        words[at + 1] = count
        self._used += 1

    def clear(self) -> None:
        """Forget the ranges that wait."""
        self._used = 0

    def flush(self, fd: int, *, touch: bool = False, poison: bool = False) -> int:
        """Mark what was added and return how many granules were missing before.

        With touch the pages are mapped for the consumer at once; with poison they are marked lost
        instead of cached.  On an error nothing was marked and the ranges stay.  Raises DriverError:
        EINVAL (an empty range, one past the end or not of whole granules), ENOMEM, ENODEV (fenced),
        ENXIO (before UMEM_INIT).
        """
        if not self._used:
            return 0
        flags = UMEM_MARK_TOUCH if touch else 0
        arg = MARK_CACHED.pack(ranges=self._address, nr=self._used, flags=flags)
        what = "POISONED" if poison else "CACHED"
        try:
            _call(fd, UMEM_MARK_PAGE_POISONED if poison else UMEM_MARK_PAGE_CACHED, arg)
        except OSError as e:
            words = self._words[: 2 * self._used]
            first = min(words[0::2])
            end = max(p + c for p, c in zip(words[0::2], words[1::2], strict=True))
            raise DriverError(
                f"UMEM_MARK_PAGE_{what}, {self._used} range(s)",
                e.errno or errno.EIO,
                area=self._area,
                pages=(first, end - first),
            ) from e
        self._used = 0
        return MARK_CACHED.ints(arg)["nr_new"]
