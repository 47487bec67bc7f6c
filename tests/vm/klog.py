# SPDX-License-Identifier: GPL-2.0-or-later
"""The judge of a kernel log: which lines of a console are a failure.

Pure: text in, findings out.  A command in the test machine that exits with 0
has still failed when the kernel complained, so the harness asks this module
about the whole console log of each run.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What a kernel says when something is wrong, with a name for each kind.  The
# first one that matches names the finding.
PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("kasan", r"BUG: K[AMC]SAN:|BUG: KFENCE:"),
        ("soft lockup", r"watchdog: BUG: soft lockup|soft lockup - CPU"),
        ("hard lockup", r"hard LOCKUP"),
        (
            "lockdep",
            r"possible circular locking|possible recursive locking"
            r"|inconsistent lock state|lock order inversion"
            r"|possible irq lock inversion|SOFTIRQ-(?:un)?safe.*->.*SOFTIRQ"
            r"|HARDIRQ-safe -> HARDIRQ-unsafe|bad unlock balance|held lock freed"
            r"|lock held when returning to user space"
            r"|lock class detected|Invalid wait context|suspicious RCU usage",
        ),
        ("hung task", r"INFO: task .* blocked for more than"),
        ("refcount", r"refcount_t:"),
        ("rcu stall", r"rcu: INFO|rcu_\w+ (?:self-)?detected (?:stall|expedited)"),
        ("bad page", r"Bad page (?:state|map|cache)|BUG: Bad (?:page|rss)"),
        ("list corruption", r"list_(?:add|del) corruption"),
        ("leak", r"kmemleak: \d+ new suspected memory leaks"),
        ("slab", r"BUG \S+ \([^)]*\): |Objects remaining in"),
        ("ubsan", r"UBSAN:"),
        (
            "sleep in atomic",
            r"sleeping function called from invalid context|scheduling while atomic",
        ),
        ("general protection", r"general protection fault"),
        ("oops", r"\bOops\b|Unable to handle kernel|kernel NULL pointer|double fault"),
        ("panic", r"Kernel panic"),
        ("memory exhausted", r"Out of memory: Killed|oom-kill:"),
        ("bug", r"\bBUG:|kernel BUG at"),
        ("warning", r"\bWARNING:|-+\[ cut here \]-+"),
        ("call trace", r"\bCall Trace:"),
    )
)

# Lines that the emulated machine prints on every boot and that say nothing of
# umem.  Each entry says why; keep it short.
ALLOWED: tuple[tuple[re.Pattern[str], str], ...] = ()

# After these the machine is not worth waiting for.
FATAL = frozenset(
    {"oops", "bug", "general protection", "panic", "kasan", "hard lockup", "hung task"}
)

# Taint flags that loading an unsigned out-of-tree module sets, and no others:
# O is out-of-tree, E is unsigned.  The bits are those of
# Documentation/admin-guide/tainted-kernels.rst.
TAINT_LETTERS = "PFSRMBUDAWCIOELKXTN"
TAINT_ALLOWED = frozenset("OE")

# What stands before the text of a console line: time stamp, caller.
_PREFIX = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ")


@dataclass(frozen=True)
class Finding:
    """One line that makes a log bad."""

    kind: str
    line_no: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind} at line {self.line_no}: {self.text}"


def judge(lines: Iterable[str]) -> list[Finding]:
    """Return what is wrong with a kernel log, in its order; empty when clean."""
    found: list[Finding] = []
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip()
        text = _PREFIX.sub("", line)
        if any(pattern.search(text) for pattern, _why in ALLOWED):
            continue
        for kind, pattern in PATTERNS:
            if pattern.search(text):
                found.append(Finding(kind, number, line))
                break
    return found


def judge_taint(mask: int) -> list[str]:
    """Return the letters of /proc/sys/kernel/tainted that are not allowed."""
    letters = [
        TAINT_LETTERS[bit] if bit < len(TAINT_LETTERS) else f"bit{bit}"
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    ]
    return [letter for letter in letters if letter not in TAINT_ALLOWED]
