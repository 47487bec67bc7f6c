# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines as users write them, and what stock QEMU gets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pyumem import qemu_cmdline
from pyumem.address import Address
from pyumem.errors import UsageError
from pyumem.qemu_cmdline import parse, parse_size, rewrite

MIB = 1 << 20
Q = "qemu-system-x86_64"
BACKEND = "-object memory-backend-file,id=ram0,mem-path=/ram,share=on,size={size}"
QMP = "-qmp unix:/qmp,server=on,wait=off"
COME = "-postcopy -incoming tcp:0:4444"


def rewritten(line: str) -> str:
    wish = parse([Q, *shlex.split(line)])
    paths = {block.id: "/ram" if wish.own_ram else f"/ram/{block.id}" for block in wish.blocks}
    return shlex.join(rewrite(wish, name="vm-1", paths=paths, qmp_path="/qmp")[1:])


@pytest.mark.parametrize(
    ("line", "size", "kept", "added"),
    [
        ("", 128, "-machine memory-backend=ram0", "-name vm-1"),
        ("-m 256M", 256, "-m 256M -machine memory-backend=ram0", "-name vm-1"),
        ("-name a", 128, "-name a -machine memory-backend=ram0", ""),
        ("-name guest=a,debug-threads=on", 128, None, ""),
        ("-M q35", 128, "-M q35,memory-backend=ram0", "-name vm-1"),
        ("-machine accel=kvm", 128, "-machine accel=kvm,memory-backend=ram0", "-name vm-1"),
        ("--machine pc", 128, "-machine pc,memory-backend=ram0", "-name vm-1"),
        ("-M pc -M accel=tcg", 128, "-M pc -M accel=tcg,memory-backend=ram0", "-name vm-1"),
        ("-S", 128, "-machine memory-backend=ram0", "-name vm-1 -S"),
        (
            "-monitor stdio -accel kvm disk.img -smp 2",
            128,
            "-monitor stdio -accel kvm disk.img -smp 2 -machine memory-backend=ram0",
            "-name vm-1",
        ),
        ("-append '-m 3 -S'", 128, "-append '-m 3 -S' -machine memory-backend=ram0", "-name vm-1"),
        ("-usb -nographic x", 128, "-usb -nographic x -machine memory-backend=ram0", "-name vm-1"),
        (
            "-incoming tcp:0:1",
            128,
            "-incoming tcp:0:1 -machine memory-backend=ram0",
            "-name vm-1",
        ),
        (
            "-incoming tcp:0:1 -incoming cpr",
            128,
            "-incoming tcp:0:1 -incoming cpr -machine memory-backend=ram0",
            "-name vm-1",
        ),
    ],
)
def test_a_vm_of_our_own(line: str, size: int, kept: str | None, added: str) -> None:
    if kept is None:
        kept = f"{line} -machine memory-backend=ram0"
    tail = f"{BACKEND.format(size=size * MIB)} {QMP} {added}"
    assert rewritten(line) == f"{kept} {tail}".strip()


@pytest.mark.parametrize(
    ("line", "autostart", "host"),
    [
        (COME, True, ""),
        (f"-S {COME}", False, ""),
        ("--postcopy --incoming tcp:192.0.2.1:4444", True, "192.0.2.1"),
        ("-incoming tcp:[::1]:4444 -postcopy -postcopy-flags 0", True, "::1"),
        (f"{COME} -postcopy-flags 1", True, ""),
    ],
)
def test_a_vm_that_is_expected(line: str, autostart: bool, host: str) -> None:
    wish = parse([Q, "-m", "64M", *shlex.split(line)])
    assert wish.postcopy_from == Address(host, 4444)
    assert wish.autostart is autostart
    assert wish.touch_pages is ("-postcopy-flags 1" in line)
    assert rewritten(f"-m 64M {line}") == (
        f"-m 64M -machine memory-backend=ram0 {BACKEND.format(size=64 * MIB)} {QMP} "
        "-name vm-1 -incoming defer -S"
    )


def test_the_seeds_own_example() -> None:
    line = "-postcopy -incoming tcp:0:4444 -monitor stdio -machine accel=kvm"
    assert rewritten(line) == (
        f"-monitor stdio -machine accel=kvm,memory-backend=ram0 {BACKEND.format(size=128 * MIB)} "
        f"{QMP} -name vm-1 -incoming defer -S"
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("256", 256 * MIB), ("256M", 256 * MIB), ("1G", 1 << 30), ("1g", 1 << 30)),
        *(("1.5G", 3 << 29), ("262144k", 256 * MIB), ("1T", 1 << 40)),
        *(("65536b", 65536), ("65537b", 65537), ("1.3G", 1395864371)),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("given", "size"), [("1.3G", 1395916800), ("1000001k,slots=2,maxmem=4G", 1024065536)]
)
def test_a_size_that_is_not_whole_is_said_to_qemu_anew(given: str, size: int) -> None:
    """Or machine and back end would differ."""
    assert rewritten(f"-m {given}").startswith(f"-m {given} -m size={size}b ")
    assert f"share=on,size={size} " in rewritten(f"-m {given}")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        *(("-m 512", 512), ("-m size=512M,slots=4,maxmem=4G", 512), ("-m 512M,slots=2", 512)),
        *(("-m slots=2,maxmem=4G", 128), ("-m 1G -m 512M", 512), ("-m 1G -m slots=1", 1024)),
    ],
)
def test_memory_options(options: str, size: int) -> None:
    (block,) = parse([Q, *options.split()]).blocks
    assert block.size == size * MIB


def test_commas_in_paths_are_doubled() -> None:
    argv = rewrite(parse([Q]), name="n", paths={"ram0": "/a,b"}, qmp_path="/c,d")
    assert any("mem-path=/a,,b,share=on" in word for word in argv)
    assert "unix:/c,,d,server=on,wait=off" in argv


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("-m", "argument is missing"),
        ("-m 0", "needs RAM"),
        ("-m lots", "not a size"),
        ("-m -5", "not a size"),
        ("-postcopy", "needs -incoming"),
        ("-postcopy-flags 1", "needs -incoming"),
        ("-postcopy-flags 1 -incoming tcp:0:1", "needs -postcopy"),
        (f"{COME} -postcopy-flags 2", "0 and 1 are known"),
        ("-postcopy -incoming defer", "tcp:HOST:PORT"),
        ("-postcopy -incoming unix:/x", "tcp:HOST:PORT"),
        ("-object memory-backend-ram,size=1G", "needs an id"),
        ("-object memory-backend-ram,id=m,size=1x", "not a size"),
        ("-object memory-backend-ram,id=m", "not a size"),
        ("-object memory-backend-ram,id=m,size=8k", "multiple of 64 KiB"),
        ("-object memory-backend-ram,id=ram0,size=1M", "ram0: the id is taken"),
        (f"-object memory-backend-ram,id={'m' * 60},size=1M -name abc", "64 characters, 63 are"),
        ("-object memory-backend-epc,id=m,size=1M", "cannot be on a shared file"),
        ("-object memory-backend-memfd,id=m,size=2M,hugetlb=on", "a directory of a hugetlbfs"),
        ('-object {"qom-type":"memory-backend-ram","id":"m"}', "not a size"),
        (f"-object memory-backend-ram,id=m,size=1M,prealloc=on {COME}", "wait for every page"),
        ("-machine pc,memory-backend=m", "m: there is no -object of that id"),
        ("-numa node,memdev=m", "m: there is no -object of that id"),
        (
            "-mem-path /x -object memory-backend-ram,id=m,size=1M -machine memory-backend=m",
            "back ends of yours",
        ),
        (
            " ".join(f"-object memory-backend-ram,id=m{n},size=1M" for n in range(64)),
            "65 memory back ends; 64",
        ),
        ("-m 0x40000000", "not a size"),  # QEMU 7.2 takes it for MiB, 10.0 does not take it
        ("-daemonize", "stays with its QEMU"),
        (f"-mem-prealloc {COME}", "wait for every page"),
        (f"-overcommit mem-lock=on {COME}", "wait for every page"),
        (f"-loadvm x {COME}", "exclude each other"),
        ("-name ../x", "allowed here"),
        ("-name guest=a/b", "allowed here"),
        (f"-name {'x' * 59}", "1 to 58 of letters"),
        (f"{COME} -incoming tcp:0:2", "one -incoming, not 2"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(line: str, what: str) -> None:
    argv = [Q, *(line.split(" ") if "{" in line else shlex.split(line))]
    with pytest.raises(UsageError, match=what):
        parse(argv)


@pytest.mark.parametrize(
    "line",
    [
        "-object rng-random,id=r,filename=/dev/urandom",
        "-mem-prealloc",
        "-overcommit mem-lock=on",
        f"-overcommit mem-lock=off {COME}",
        "-overcommit cpu-pm=on",
        "-numa node,cpus=0-1",
    ],
)
def test_what_is_none_of_our_business_stays(line: str) -> None:
    assert rewritten(line).startswith(line.removesuffix(COME).strip())


BACKENDS = "memory-backend-file,id={},mem-path=/ram/{},share=on,size={}"


@pytest.mark.parametrize(
    "kind",
    [
        "memory-backend-ram,id=m,size=1G",
        "qom-type=memory-backend-ram,id=m,size=1024M,share=off",
        "id=m,size=1073741824,qom-type=memory-backend-memfd,seal=on,hugetlb=off",
        "memory-backend-file,id=m,size=0x40000000,mem-path=/x,share=on,align=2M,pmem=off",
    ],
)
def test_memory_of_any_kind_comes_to_be_on_a_file_of_ours(kind: str) -> None:
    line = f"-object {kind} -m 1G -machine pc,memory-backend=m"
    backend = BACKENDS.format("m", "m", 1 << 30)
    assert rewritten(line) == (
        f"-m 1G -machine pc,memory-backend=m -object {backend} {QMP} -name vm-1"
    )


def test_what_says_nothing_of_the_file_stays() -> None:
    kept = "host-nodes=0-1,policy=bind,merge=off,prealloc=on"
    line = f"-object memory-backend-ram,id=m,size=1M,{kept} -numa node,memdev=m"
    assert f"{BACKENDS.format('m', 'm', MIB)},{kept} " in rewritten(line)


def test_json_stays_json() -> None:
    given = {"qom-type": "memory-backend-memfd", "id": "pc.ram", "share": False, "size": MIB}
    more = {"x-use-canonical-path-for-ramblock-id": False, "host-nodes": [0]}
    line = shlex.join(["-object", json.dumps(given | more), "-M", "q35,memory-backend=pc.ram"])
    words = shlex.split(rewritten(line))
    told = json.loads(words[words.index("-object") + 1])
    assert told == given | more | {
        "qom-type": "memory-backend-file",
        "mem-path": "/ram/pc.ram",
        "share": True,
    }
    assert "-M q35,memory-backend=pc.ram -object" in " ".join(words)


def test_several_blocks_and_a_dimm() -> None:
    nodes = " ".join(
        f"-object memory-backend-ram,id=m{n},size=64M -numa node,nodeid={n},memdev=m{n}"
        for n in (0, 1)
    )
    dimm = "-object memory-backend-ram,id=d,size=32M -device pc-dimm,id=dimm0,memdev=d"
    told = rewritten(f"-m 128M,slots=2,maxmem=1G {nodes} {dimm}")
    assert "memory-backend=" not in told
    for name, size in (("m0", 64), ("m1", 64), ("d", 32)):
        assert f"-object {BACKENDS.format(name, name, size * MIB)} " in told
    assert "-device pc-dimm,id=dimm0,memdev=d" in told


def test_a_dimm_beside_ram_of_ours() -> None:
    line = "-m 64M,slots=2,maxmem=1G -object memory-backend-ram,id=d,size=32M"
    blocks = parse([Q, *shlex.split(f"{line} -device pc-dimm,memdev=d")]).blocks
    assert [(block.id, block.size >> 20) for block in blocks] == [("d", 32), ("ram0", 64)]


def test_where_ram_of_ours_is_to_be() -> None:
    (block,) = parse([Q, "-m", "64M", "-mem-path", "/dev/hugepages"]).blocks
    assert (block.id, block.mem_path, block.keeps_file) == ("ram0", "/dev/hugepages", False)


def test_no_binary() -> None:
    with pytest.raises(UsageError, match="which QEMU"):
        parse([])


QEMUS = [
    pytest.param("qemu-system-x86_64", id="installed"),
    pytest.param(str(Path(__file__).parents[2] / "build/qemu-10.0/qemu-system-x86_64"), id="10.0"),
]


@pytest.mark.parametrize("qemu", QEMUS)
def test_options_without_an_argument_are_those_of_qemu(qemu: str) -> None:
    if not shutil.which(qemu):
        # Unit tests run anywhere; `make setup` gets both.
        pytest.fail(f"{qemu} is missing: run make setup")
    text = subprocess.run([qemu, "-help"], check=True, capture_output=True, text=True).stdout
    # "-s      shorthand for ..." and "-no-user-config" alone have no argument; "-m size" has.
    shown = re.findall(r"^-([A-Za-z][\w-]*)(?: or -[\w-]+)?([ \t]*)(\S?)", text, re.MULTILINE)
    flags = {name for name, gap, after in shown if not after or len(gap) > 1 or "\t" in gap}
    flags.discard("dtb")  # its line has blanks before the argument
    assert {"S", "s", "no-user-config", "usb", "enable-kvm"} <= flags, "the help was understood"
    assert {"m", "kernel", "qmp", "incoming"}.isdisjoint(flags)
    assert flags <= qemu_cmdline._FLAGS
    # Of async-teardown the help of 7.2 has one blank before the description.
    with_argument = {name for name, _, _ in shown} - flags - {"async-teardown"}
    assert with_argument.isdisjoint(qemu_cmdline._FLAGS)


def test_s_does_not_swallow_the_next_option() -> None:
    wish = parse(["qemu", "-s", "-S", "-no-user-config", "-m", "64M"])
    assert not wish.autostart and wish.blocks[0].size == 64 << 20
