# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left for sources that come back, and who is told."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pyumem.address import Address
from pyumem.errors import LinkError, RefusedError
from pyumem.greeting import AsyncLink, introduce
from pyumem.hello import Hello, Lane
from pyumem.recovery import Fate, Verdict, hear_verdict
from pyumem.tls import Security
from pyumem.verdicts import KEEP_S, Judged, Verdicts, stay_for

SESSION = "0" * 32
HELLO = Hello(Lane.CONTROL, SESSION, "vm1", "ab" * 32, "umem", resume=True)


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def judged(at: float | None = None) -> Judged:
    now = time.time() if at is None else at
    return Judged(SESSION, "vm1", "tcp:127.0.0.1:4444", now, Fate.ABORTED, "its QEMU died")


def test_a_verdict_outlives_its_daemon(runtime_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = judged()
    Verdicts().judge(one)
    old = replace(judged(time.time() - KEEP_S - 1), session="1" * 32)
    Verdicts().judge(old)
    (runtime_dir / "verdicts/x.json").write_text("[1]")
    verdicts = Verdicts()
    assert verdicts.load() == [one]
    assert verdicts.of(SESSION) == Verdict(Fate.ABORTED, "its QEMU died")
    assert (
        verdicts.of("1" * 32) is None and not (runtime_dir / f"verdicts/{'1' * 32}.json").exists()
    )
    assert "x.json cannot be read" in caplog.text
    assert one.recent and not old.recent


def test_a_verdict_that_cannot_be_written_is_told_all_the_same(runtime_dir: Path) -> None:
    (runtime_dir / "verdicts").write_text("")
    verdicts = Verdicts()
    verdicts.judge(judged())
    assert verdicts.of(SESSION) is not None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_who_comes_back_is_told_and_nobody_else() -> None:
    address = Address("127.0.0.1", free_port())
    verdicts = Verdicts()
    verdicts.judge(judged())

    async def main() -> None:
        stay = asyncio.create_task(stay_for(address, verdicts, Security(b"secret")))

        async def come(hello: Hello, token: bytes = b"secret") -> Verdict:
            async with asyncio.timeout(20):
                while True:
                    try:
                        link = await AsyncLink.connect(address)
                        break
                    except LinkError:
                        await asyncio.sleep(0.01)
                try:
                    await introduce(link, token, hello)
                    return await hear_verdict(link)
                finally:
                    link.close()

        for _ in range(6):  # more than are greeted at a time, and again if the answer was lost
            assert (await come(HELLO)).fate is Fate.ABORTED
        with pytest.raises(RefusedError, match="no VM is expected here"):
            await come(replace(HELLO, session="1" * 32))
        with pytest.raises(RefusedError, match="no VM is expected here"):
            await come(replace(HELLO, resume=False))
        with pytest.raises(RefusedError, match="tokens"):
            await come(HELLO, b"wrong")
        stay.cancel()
        await asyncio.gather(stay, return_exceptions=True)
        with pytest.raises(LinkError, match="refused"):
            await AsyncLink.connect(address)

    asyncio.run(main())


def test_a_port_that_somebody_has_is_left_to_him() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        asyncio.run(asyncio.wait_for(stay_for(address, Verdicts(), Security()), 20))
