# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's verifier is honest: it sees each kind of damage, and none where there is none.

This is the very program that runs in the guest, started here on the host; its
--debug option spoils pages behind its back.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

BUILD = Path(os.environ.get("UMEM_BUILD", Path(__file__).resolve().parents[2] / "build"))
PROGRAM = BUILD / "guest" / "workload"


class Workload:
    """A running workload; `verdict` asks it."""

    def __init__(self, kind: str, writers: int, mb: int = 4) -> None:
        self.process = subprocess.Popen(
            [PROGRAM, "--debug", kind, str(writers), str(mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        self.wait("ready")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def _read(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            yield line.strip()

    def wait(self, kind: str) -> str:
        for line in self._read():
            if line.startswith(f"UMEM-GUEST {kind}"):
                return line
        raise AssertionError(f"it ended without {kind!r}: {self.lines}")

    def verdict(self) -> str:
        self.send("verdict")
        return self.wait("verdict")


@pytest.mark.parametrize("kind", ["verify", "ab", "idle"])
@pytest.mark.parametrize("writers", [1, 3])
def test_sound_memory_is_ok(kind: str, writers: int) -> None:
    with Workload(kind, writers) as workload:
        for _ in range(3):
            verdict = workload.verdict()
            assert verdict.startswith("UMEM-GUEST verdict ok rounds=")
            assert verdict.endswith("pages=1024 bad=0")


@pytest.mark.parametrize("damage", ["zero", "flip", "foreign", "half", "old"])
@pytest.mark.parametrize("page", [0, 511, 1023])
def test_verify_sees(damage: str, page: int) -> None:
    with Workload("verify", 2) as workload:
        assert " ok " in workload.verdict()
        workload.send(f"corrupt {damage} {page}")
        verdict = workload.verdict()
        assert verdict.startswith("UMEM-GUEST verdict corrupt ")
        assert verdict.endswith(" bad=1")
        assert any(f"bad page={page} " in line for line in workload.lines)
        # What was bad once stays bad in every later verdict.
        assert workload.verdict().endswith(" bad=1")


@pytest.mark.parametrize("damage", ["zero", "flip", "foreign", "half"])
def test_idle_sees(damage: str) -> None:
    with Workload("idle", 1) as workload:
        workload.send(f"corrupt {damage} 77")
        assert workload.verdict().startswith("UMEM-GUEST verdict corrupt ")


@pytest.mark.parametrize("damage", ["zero", "old"])
def test_ab_sees(damage: str) -> None:
    with Workload("ab", 1) as workload:
        # Past the first rounds, so that a zero is no value that may stand there.
        workload.send("beat 50")
        workload.wait("beat")
        for page in (100, 600):
            workload.send(f"corrupt {damage} {page}")
        assert workload.verdict().startswith("UMEM-GUEST verdict corrupt ")


def test_stop_and_go() -> None:
    with Workload("verify", 2) as workload:
        workload.send("stop")
        first = workload.verdict()
        assert workload.verdict() == first
        workload.send("corrupt flip 5")
        assert " corrupt " in workload.verdict()
        workload.send("go")
        workload.wait("verify")


def test_ticks_tell_the_largest_gap() -> None:
    with Workload("idle", 1) as workload:
        tick = workload.wait("tick")
    fields = dict(word.split("=") for word in tick.split() if "=" in word)
    assert int(fields["t_ms"]) > 0
    assert 0 <= int(fields["max_gap_ms"]) < 1000


def test_refuses_nonsense() -> None:
    for arguments in (["verify"], ["no", "1", "4"], ["verify", "0", "4"], ["verify", "1", "0"]):
        done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "fatal" in done.stdout
