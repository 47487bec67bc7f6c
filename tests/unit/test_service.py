# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl serve under a service manager: real processes, with a manager that we play."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyumem import serve
from pyumem.control import ControlClient
from pyumem.service import Manager
from pyumem.tls import Security

SERVE = "from pyumem.cli import main; main(['serve'])"
# As systemd starts it: the sockets from descriptor 3 on, and whose they are.
HANDED_OVER = """
import os, sys
fd, *argv = sys.argv[1:]
os.dup2(int(fd), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(argv[0], argv)
"""


class FakeManager:
    def __init__(self, tmp: Path) -> None:
        self.run = tmp / "run"
        self.run.mkdir(mode=0o700)
        self.env = {
            **os.environ,
            "UMEM_RUNTIME_DIR": str(self.run),
            "NOTIFY_SOCKET": str(tmp / "notify"),
        }
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(tmp / "notify"))
        self.notify.settimeout(30)
        self.process: subprocess.Popen[str] | None = None

    def listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        return listener

    def start(self, code: str = SERVE, listener: socket.socket | None = None) -> None:
        argv = [sys.executable, "-c", code]
        fds: tuple[int, ...] = ()
        if listener is not None:
            self.env["LISTEN_FDS"] = "1"
            fds = (listener.fileno(),)
            argv = [sys.executable, "-c", HANDED_OVER, str(listener.fileno()), *argv]
        self.process = subprocess.Popen(
            argv, env=self.env, stderr=subprocess.PIPE, text=True, pass_fds=fds
        )

    def hear(self) -> list[str]:
        return self.notify.recv(4096).decode().splitlines()

    def hear_until(self, word: str) -> list[str]:
        while word not in (said := self.hear()):
            pass
        return said

    def ended(self) -> tuple[int, str]:
        assert self.process is not None
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    manager = FakeManager(tmp_path)
    yield manager
    manager.notify.close()
    if manager.process and manager.process.poll() is None:
        manager.process.kill()
        manager.process.communicate()


def test_a_socket_is_taken_over_and_left_behind(manager: FakeManager) -> None:
    path = manager.run / "serve.sock"
    with manager.listen(path) as listener:
        with ControlClient(path, timeout=30) as early:  # before there is a daemon
            manager.start(listener=listener)
            assert early.ask("status")["vms"] == []
        assert manager.hear() == ["READY=1", "STATUS=no VM is expected"]
        assert manager.process is not None
        manager.process.terminate()
        assert manager.hear_until("STOPPING=1")
        assert manager.ended()[0] == 0
        assert path.exists(), "the path is the manager's"
        # Whoever comes now has the next one started.
        with ControlClient(path, timeout=30) as early:
            manager.start(listener=listener)
            assert early.ask("status")["vms"] == []


def test_a_socket_that_nobody_would_come_to(manager: FakeManager, tmp_path: Path) -> None:
    with manager.listen(tmp_path / "elsewhere") as listener:
        manager.start(listener=listener)
        status, err = manager.ended()
    assert status == 1 and "elsewhere" in err and "Traceback" not in err


def test_a_socket_of_somebody_else_is_not_taken(manager: FakeManager) -> None:
    """LISTEN_FDS that was for our parent."""
    manager.env |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    manager.start()
    manager.hear_until("READY=1")
    mode = (manager.run / "serve.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_the_watchdog_notices_a_loop_that_hangs(manager: FakeManager) -> None:
    """Each sign of life is the loop's: none comes while it is kept busy."""
    manager.env["WATCHDOG_USEC"] = "300000"
    manager.start(
        "import asyncio, time\n"
        "from pyumem.serve import Daemon\n"
        "from pyumem.tls import Security\n"
        "def hang():\n"
        "    asyncio.get_running_loop().call_later(0.5, time.sleep, 1.5)\n"
        "asyncio.run(Daemon(Security()).run(hang))\n"
    )
    assert "READY=1" in manager.hear()
    heard = [time.monotonic()]
    while heard[-1] - heard[0] < 3:
        assert manager.hear() == ["WATCHDOG=1"]
        heard.append(time.monotonic())
    pauses = sorted(after - before for before, after in itertools.pairwise(heard))
    assert pauses[-1] > 1.2, "it hung"
    assert pauses[len(pauses) // 2] < 0.3, "it lived"


def test_a_watchdog_of_another_process_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    manager = Manager.from_environment()
    assert manager.there and not manager.watchdog_s
    manager.ready("nobody hears it")
    assert "NOTIFY_SOCKET" not in os.environ, "it is not for workers"


class Needy:
    name, state, depends_on_us = "vm1", "postcopy-active", True


def test_the_first_signal_of_a_manager_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))

    async def stopped() -> bool:
        daemon = serve.Daemon(Security())
        daemon._vms["vm1"] = Needy()  # type: ignore[assignment]
        daemon.request_stop(signal.SIGTERM.name)
        return daemon._stop.is_set()

    assert not asyncio.run(stopped())
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    assert asyncio.run(stopped())
    assert "stopping, though vm1 still get(s) memory" in caplog.text
