# SPDX-License-Identifier: GPL-2.0-or-later
"""uapi.py against the uapi header, as a C compiler understands it."""

from __future__ import annotations

import array
import errno
import re
import subprocess
from pathlib import Path

import pytest

from pyumem import uapi
from pyumem.errors import DriverError, UmemError

HEADER_DIR = Path(__file__).parents[2] / "kmod/include/uapi"
HEADER = HEADER_DIR / "linux/umem.h"

CONSTANTS = {
    "UMEM_IOC_MAGIC": uapi.MAGIC,
    "UMEM_NAME_MAX": uapi.NAME_MAX,
    "UMEM_MARK_MAX": uapi.MARK_MAX,
    "UMEM_GRANULE_MAX": uapi.GRANULE_MAX,
    "UMEM_CREATE_HUGE": uapi.UMEM_CREATE_HUGE,
    "UMEM_INFO_HUGE": uapi.UMEM_INFO_HUGE,
    "UMEM_MARK_TOUCH": uapi.UMEM_MARK_TOUCH,
    "UMEM_BITMAP_CACHED": uapi.UMEM_BITMAP_CACHED,
    "UMEM_BITMAP_REQUESTED": uapi.UMEM_BITMAP_REQUESTED,
    "UMEM_BITMAP_POISONED": uapi.UMEM_BITMAP_POISONED,
    "UMEM_LATENCY_BUCKETS": uapi.LATENCY_BUCKETS,
    "UMEM_SET_LOSS_POLICY": uapi.UMEM_SET_LOSS_POLICY,
    "UMEM_MARK_PAGE_POISONED": uapi.UMEM_MARK_PAGE_POISONED,
    "UMEM_GET_BITMAP": uapi.UMEM_GET_BITMAP,
    "UMEM_MAKE_VMA_ANONYMOUS": uapi.UMEM_MAKE_VMA_ANONYMOUS,
    "UMEM_GET_STATS": uapi.UMEM_GET_STATS,
    "UMEM_SET_DIRTY_LOG": uapi.UMEM_SET_DIRTY_LOG,
    "UMEM_GET_DIRTY": uapi.UMEM_GET_DIRTY,
    "UMEM_DIRTY_PEEK": uapi.UMEM_DIRTY_PEEK,
    "UMEM_INFO_SERVED": uapi.UMEM_INFO_SERVED,
    "UMEM_INFO_COMPLETE": uapi.UMEM_INFO_COMPLETE,
    "UMEM_INFO_MAPPED": uapi.UMEM_INFO_MAPPED,
    "UMEM_INFO_NODE": uapi.UMEM_INFO_NODE,
    "UMEM_REATTACH_FORCE": uapi.UMEM_REATTACH_FORCE,
    "UMEM_REQUEST_ASYNC": uapi.UMEM_REQUEST_ASYNC,
    "UMEM_REQUEST_DISCARDED": uapi.UMEM_REQUEST_DISCARDED,
    "UMEM_INIT": uapi.UMEM_INIT,
    "UMEM_DEV_CREATE_UMEM": uapi.UMEM_DEV_CREATE_UMEM,
    "UMEM_DEV_LIST": uapi.UMEM_DEV_LIST,
    "UMEM_DEV_REATTACH": uapi.UMEM_DEV_REATTACH,
    "UMEM_GET_PAGE_REQUEST": uapi.UMEM_GET_PAGE_REQUEST,
    "UMEM_MARK_PAGE_CACHED": uapi.UMEM_MARK_PAGE_CACHED,
    "UMEM_GET_INFO": uapi.UMEM_GET_INFO,
}


def expected() -> dict[str, int]:
    """What uapi.py believes: constant, sizeof(struct) or struct.member offset and size."""
    facts = dict(CONSTANTS)
    for layout in uapi.LAYOUTS:
        facts[f"sizeof(struct {layout.tag})"] = layout.size
        for member, offset, size in layout.offsets():
            facts[f"offsetof(struct {layout.tag}, {member})"] = offset
            facts[f"sizeof(((struct {layout.tag} *)0)->{member})"] = size
    return facts


def compile_c(text: str, tmp_path: Path, *flags: str) -> Path:
    source, binary = tmp_path / "facts.c", tmp_path / "facts"
    source.write_text("#include <stddef.h>\n#include <linux/umem.h>\n" + text)
    command = ["gcc", "-Wall", "-Werror", f"-I{HEADER_DIR}", *flags, str(source), "-o", str(binary)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binary


def flags_32() -> tuple[str, ...]:
    """-m32 without a 32-bit libc: <asm/types.h> is then taken from the native architecture's
    folder.
    """
    multiarch = subprocess.run(
        ["gcc", "-print-multiarch"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return ("-m32", "-fsyntax-only", "-idirafter", f"/usr/include/{multiarch}")


def test_numbers_sizes_and_offsets(tmp_path: Path) -> None:
    facts = expected()
    prints = "\n".join(f'printf("%llu\\n", (unsigned long long)({fact}));' for fact in facts)
    binary = compile_c(f"#include <stdio.h>\nint main(void) {{ {prints} return 0; }}\n", tmp_path)
    out = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    assert dict(zip(facts, map(int, out.split()), strict=True)) == facts


def asserts(facts: dict[str, int]) -> str:
    return "\n".join(f'_Static_assert({f} == {v}ULL, "{f}");' for f, v in facts.items())


def test_layout_is_the_same_for_32_bit(tmp_path: Path) -> None:
    """Only the compiler proper is needed for this, no 32-bit libc."""
    compile_c(
        '_Static_assert(sizeof(long) == 4, "really 32 bits");\n' + asserts(expected()),
        tmp_path,
        *flags_32(),
    )


def test_the_32_bit_check_can_fail(tmp_path: Path) -> None:
    wrong = dict(expected())
    wrong["sizeof(struct umem_list)"] += 4
    with pytest.raises(AssertionError, match=r"static assertion failed.*umem_list"):
        compile_c(asserts(wrong), tmp_path, *flags_32())


@pytest.mark.parametrize("layout", uapi.LAYOUTS, ids=lambda layout: layout.tag)
def test_every_member_is_aligned_by_itself(layout: uapi.Layout) -> None:
    """So that no compiler and no ABI has a reason to pad."""
    for (_, fmt), (member, offset, size) in zip(layout.members, layout.offsets(), strict=True):
        align = size if fmt in "QIi" else (4 if fmt.endswith("x") else 1)
        assert offset % align == 0, member
    assert layout.size % 8 == 0


def test_nothing_of_the_header_is_missing() -> None:
    text = HEADER.read_text()
    structs = set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    assert structs == {layout.tag for layout in uapi.LAYOUTS}
    defines = set(re.findall(r"^#define\s+(UMEM_\w+)", text, re.MULTILINE))
    assert defines == set(CONSTANTS)


def test_pack_sets_and_zeroes() -> None:
    arg = uapi.CREATE.pack(size=1 << 40, name=b"vm.ram0")
    assert len(arg) == uapi.CREATE.size
    assert uapi.CREATE.ints(arg) == {
        "size": 1 << 40,
        "flags": 0,
        "granule_size": 0,
        "server_fd": 0,
        "shmem_fd": 0,
        "id": 0,
        "loss_timeout_ms": 0,
    }
    assert uapi.CREATE.name(arg) == "vm.ram0"
    with pytest.raises(ValueError, match="no sise"):
        uapi.CREATE.pack(sise=1)


def test_a_call_that_may_sleep_lets_other_threads_run() -> None:
    """Before 3.13 Python keeps its interpreter lock for arguments over 1024 bytes."""
    assert all(layout.size <= 1024 for layout in uapi.LAYOUTS)


def test_ioc_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="16384"):
        uapi._iowr(uapi.MAGIC, 1, 1 << 14)


def test_mark_buffer_joins_and_bounds() -> None:
    marks = uapi.MarkBuffer(2)
    marks.add(5, 1)
    marks.add(6, 2)
    marks.add(20, 1)
    assert len(marks) == 2
    assert marks.full
    assert list(marks._words) == [5, 3, 20, 1]
    marks.add(21, 4)  # joins, so it still fits
    with pytest.raises(BufferError):
        marks.add(7, 1)
    marks.clear()
    assert marks.flush(-1) == 0  # nothing to say: the driver is not called
    for bad in (0, uapi.MARK_MAX + 1):
        with pytest.raises(ValueError, match="mark buffer"):
            uapi.MarkBuffer(bad)


def test_errors_name_area_and_range(tmp_path: Path) -> None:
    """On a file that is no area every ioctl gives ENOTTY."""
    with (tmp_path / "plain").open("w+b") as plain:
        fd = plain.fileno()
        marks = uapi.MarkBuffer(area="vm.ram0")
        marks.add(100, 10)
        marks.add(7, 1)
        with pytest.raises(DriverError, match=r"area vm\.ram0.*pages 7\.\.109") as caught:
            marks.flush(fd)
        assert caught.value.errno == errno.ENOTTY
        assert caught.value.pages == (7, 103)
        assert len(marks) == 2  # kept: nothing was marked
        with pytest.raises(DriverError, match=r"vm\.ram0"):
            uapi.RequestBuffer(1, area="vm.ram0").get(fd)
        for call in (
            lambda: uapi.info(fd, area="vm.ram0"),
            lambda: uapi.create(fd, "vm.ram0", 4096),
            lambda: uapi.init(fd, 4096),
            lambda: uapi.list_areas(fd),
            lambda: uapi.reattach(fd, 3),
        ):
            with pytest.raises(UmemError) as failed:
                call()
            assert failed.value.errno == errno.ENOTTY  # type: ignore[attr-defined]


def test_no_driver_says_so(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"umem\.ko loaded") as caught:
        uapi.open_control(str(tmp_path / "umem"))
    assert caught.value.errno == errno.ENOENT


def test_too_long_a_name_is_refused_before_struct_cuts_it() -> None:
    with pytest.raises(DriverError) as caught:
        uapi.create(-1, "x" * (uapi.NAME_MAX + 1), 4096)
    assert caught.value.errno == errno.EINVAL


class FakeDriver:
    """Stands in for fcntl.ioctl on UMEM_DEV_LIST: interrupts first, then lists areas in pieces."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.calls = 0
        self.interrupt = True

    def ioctl(self, _fd: int, number: int, arg: bytearray) -> int:
        if self.interrupt:
            self.interrupt = False
            raise InterruptedError
        self.calls += 1
        assert number == uapi.UMEM_DEV_LIST
        got = uapi.LIST.ints(arg)
        alive = [i for i in self.ids if i >= got["first_id"]]
        out = b"".join(
            uapi.INFO.pack(id=i, name=f"a{i}".encode(), size=4096, granule_size=4096, flags=9)
            for i in alive[: got["nr"]]
        )
        self.memory[: len(out)] = out
        arg[:] = uapi.LIST.pack(
            infos=got["infos"],
            nr=min(got["nr"], len(alive)),
            first_id=got["first_id"],
            total=len(alive),
        )
        return 0

    memory: memoryview


def test_list_goes_on_where_the_room_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver([0, 1, 5, 9, 10])
    real_array = array.array

    def remember(code: str, data: bytes) -> array.array[int]:
        made = real_array(code, data)
        driver.memory = memoryview(made).cast("B")
        return made

    monkeypatch.setattr("pyumem.uapi.fcntl.ioctl", driver.ioctl)
    monkeypatch.setattr("pyumem.uapi.array.array", remember)
    found = uapi.list_areas(3, room=2)
    assert [(a.id, a.name) for a in found] == [(i, f"a{i}") for i in driver.ids]
    assert driver.calls == 3
    assert found[0].served
    assert found[0].has_node
    assert not found[0].complete
    assert found[0].nr_granules == 1
    assert uapi.area_info(3, 9) == found[3]
    with pytest.raises(DriverError, match=r"umem6.*No such device"):
        uapi.area_info(3, 6)
    with pytest.raises(DriverError, match="umem11"):
        uapi.area_info(3, 11)
