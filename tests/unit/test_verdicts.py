# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left for sources that come back, and who is told."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pyumem.address import Address
from pyumem.area import Area
from pyumem.errors import DriverError, LinkError, RefusedError
from pyumem.greeting import AsyncLink, introduce
from pyumem.hello import Hello, Lane
from pyumem.recovery import Fate, Verdict, hear_verdict
from pyumem.serve import Daemon
from pyumem.tls import Security
from pyumem.verdicts import KEEP_S, Judged, Verdicts, stay_for
from tests.unit.test_incoming import Launcher

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
    assert not verdicts.judge(judged())
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


def test_a_port_is_listened_on_again_when_the_vm_that_had_it_is_not_expected_any_more(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of who asks wait for that word: it must not depend on who uses the port."""
    del runtime_dir

    def no(*_wanted: object, **_options: object) -> Area:
        raise DriverError("create", errno.ENOMEM)

    monkeypatch.setattr(Area, "create", no)
    port = free_port()
    addresses = [Address("127.0.0.1", port), Address("127.0.0.2", port)]

    async def reachable() -> list[bool]:
        found = []
        for address in addresses:
            try:
                (await AsyncLink.connect(address)).close()
                found.append(True)
            except LinkError:
                found.append(False)
        return found

    async def main() -> None:
        daemon = Daemon(Security())
        for n, address in enumerate(addresses):
            daemon._verdicts.judge(
                replace(judged(), session=str(n) * 32, listen=str(address)),
            )
        daemon._stay_where_wanted()
        await asyncio.sleep(0.1)
        assert await reachable() == [True, True]
        question = {
            "name": "other",
            "listen": str(addresses[0]),
            "areas": [{"id": "ram0", "size_bytes": 4096, "page_size_bytes": 4096}],
            "qmp": "/q",
            "incoming": "/i",
            "autostart": True,
            "touch": False,
        }
        with pytest.raises(DriverError):
            await daemon._incoming(question, Launcher())
        await asyncio.sleep(0.1)
        assert await reachable() == [True, True]
        daemon._stop.set()
        await daemon._end_all()

    asyncio.run(main())


def test_the_idle_do_not_keep_others_out() -> None:
    address = Address("127.0.0.1", free_port())
    verdicts = Verdicts()
    verdicts._known[SESSION] = judged()

    async def idle(host: str) -> None:
        while True:
            reader, writer = await asyncio.open_connection(
                address.host, address.port, local_addr=(host, 0)
            )
            while await reader.read(100):
                pass
            writer.close()

    async def main() -> None:
        stay = asyncio.create_task(stay_for(address, verdicts, Security()))
        await asyncio.sleep(0.2)
        crowd = [asyncio.create_task(idle(f"127.0.0.{2 + n % 2}")) for n in range(40)]
        await asyncio.sleep(0.3)
        for _ in range(5):
            link = await AsyncLink.connect(address)
            await introduce(link, b"", HELLO)
            assert (await hear_verdict(link)).fate is Fate.ABORTED
            link.close()
        for task in (*crowd, stay):
            task.cancel()
        await asyncio.gather(*crowd, stay, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), 60))
