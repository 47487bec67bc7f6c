# SPDX-License-Identifier: GPL-2.0-or-later
"""The judge of the kernel log catches each kind, and lets a clean boot pass."""

import pytest

from tests.vm import klog

CAUGHT = [
    ("warning", "WARNING: CPU: 1 PID: 300 at kmod/area.c:10 umem_x+0x1/0x2 [umem]"),
    ("warning", "------------[ cut here ]------------"),
    ("warning", "WARNING: test"),
    ("bug", "BUG: unable to handle page fault for address: ffffc90000000000"),
    ("bug", "kernel BUG at mm/shmem.c:100!"),
    ("oops", "BUG: kernel NULL pointer dereference, address: 0000000000000008"),
    ("oops", "Oops: 0002 [#1] PREEMPT SMP NOPTI"),
    ("kasan", "BUG: KASAN: slab-use-after-free in umem_release+0x20/0x40 [umem]"),
    ("kasan", "BUG: KFENCE: use-after-free read in umem_release+0x20/0x40"),
    ("lockdep", "WARNING: possible circular locking dependency detected"),
    ("lockdep", "WARNING: possible recursive locking detected"),
    ("lockdep", "WARNING: inconsistent lock state"),
    ("lockdep", "WARNING: suspicious RCU usage"),
    ("lockdep", "[ BUG: Invalid wait context ]"),
    ("lockdep", "WARNING: bad unlock balance detected!"),
    ("hung task", "INFO: task umemctl:812 blocked for more than 120 seconds."),
    ("refcount", "refcount_t: underflow; use-after-free."),
    ("rcu stall", "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
    ("bad page", "BUG: Bad page state in process umem  pfn:12345"),
    ("bad page", "BUG: Bad page cache in process umem  pfn:12345"),
    ("bad page", "BUG: Bad rss-counter state mm:0000 type:MM_SHMEMPAGES val:1"),
    ("list corruption", "list_del corruption. prev->next should be 0, but was 1"),
    ("general protection", "general protection fault, probably for non-canonical address"),
    ("leak", "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)"),
    ("soft lockup", "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [python:300]"),
    ("hard lockup", "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0"),
    ("ubsan", "UBSAN: array-index-out-of-bounds in kmod/request.c:20:3"),
    ("panic", "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100"),
    ("sleep in atomic", "BUG: sleeping function called from invalid context at mm/a.c:1"),
    ("sleep in atomic", "BUG: scheduling while atomic: umem/300/0x00000002"),
    ("slab", "BUG umem_wait (Tainted: G           OE     ): Objects remaining in umem_wait"),
    ("memory exhausted", "Out of memory: Killed process 812 (qemu-system-x86)"),
    ("call trace", " Call Trace:"),
]

CLEAN = """\
[    0.000000] Linux version 6.1.0-56-amd64 (debian-kernel@lists.debian.org)
[    0.879738] tsc: Marking TSC unstable due to TSCs unsynchronized
[    2.473915] AMD-Vi: AMD IOMMUv2 functionality not available on this system - This is not a bug.
[    4.503285] virtio-fs: tag <ROOTFS> not found
[   13.888831] Module acpi_cpufreq is blacklisted
[   17.000000] umem: loading out-of-tree module taints kernel.
[   17.000001] umem: module verification failed: signature and/or required key missing
[   17.778085] kvm: exiting hardware virtualization
[   17.789792] reboot: Power down
"""


@pytest.mark.parametrize(("kind", "text"), CAUGHT)
@pytest.mark.parametrize(
    "prefix", ["", "[   17.223110] ", "<4>[    1.0] ", "[  1.000000][  T300] "]
)
def test_catches(kind: str, text: str, prefix: str) -> None:
    findings = klog.judge(["[    1.000000] fine", prefix + text])
    assert [(finding.kind, finding.line_no) for finding in findings] == [(kind, 2)]


def test_clean_boot_passes() -> None:
    assert klog.judge(CLEAN.splitlines()) == []


def test_allowed_lines_are_few_and_explained() -> None:
    assert len(klog.ALLOWED) <= 5
    assert all(len(why) > 20 for _pattern, why in klog.ALLOWED)


@pytest.mark.parametrize(
    ("mask", "bad"),
    [
        (0, []),
        (1 << 12 | 1 << 13, []),
        (1 << 9, ["W"]),
        (1 << 7 | 1 << 12, ["D"]),
        (1 << 5, ["B"]),
        (1 << 14, ["L"]),
        (1 << 30, ["bit30"]),
    ],
)
def test_taint(mask: int, bad: list[str]) -> None:
    assert klog.judge_taint(mask) == bad
