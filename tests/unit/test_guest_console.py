# SPDX-License-Identifier: GPL-2.0-or-later
"""The console of the inner guest, against a socket of our own instead of QEMU's."""

import socket
import threading
from pathlib import Path

import pytest

from tests.vm.guest import GuestConsole, GuestError, GuestSpec, Message, longest_silence
from tests.vm.hosts import Link


def test_message() -> None:
    message = Message.parse(5.0, "[ 1.0] noise UMEM-GUEST verdict ok rounds=3 pages=9 bad=0")
    assert message is not None
    assert (message.time, message.kind, message.words) == (5.0, "verdict", ("ok",))
    assert message.fields == {"rounds": "3", "pages": "9", "bad": "0"}
    assert Message.parse(0, "Kernel panic - not syncing") is None
    empty = Message.parse(0, "UMEM-GUEST ")
    assert empty is not None
    assert empty.kind == ""


def test_longest_silence_spans_consoles() -> None:
    source, destination = GuestConsole(Path("/a")), GuestConsole(Path("/b"))
    source.messages = [Message(t, "beat", (), {}, "") for t in (1.0, 1.02, 1.04)]
    destination.messages = [Message(t, "beat", (), {}, "") for t in (1.5, 1.52)]
    assert longest_silence(source, destination, start=1.0, end=2.0) == pytest.approx(0.46)
    assert longest_silence(source, start=3.0, end=4.0) == pytest.approx(1.0)


def test_verdict_is_asked_for_and_read(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def guest() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"UMEM-GUEST ready\nUMEM-GUEST verdict ok rounds=1 pa")
                assert connection.recv(100) == b"verdict\n"
                connection.sendall(
                    b"ges=8 bad=0\nUMEM-GUEST verdict corrupt rounds=2 pages=8 bad=1\n"
                )

        thread = threading.Thread(target=guest)
        thread.start()
        with GuestConsole(path) as console:
            console.wait("ready", timeout=5)
            # The half line that was on its way is no answer to a later question,
            # but a guest prints whole lines: the first whole one after it is.
            verdict = console.verdict(timeout=5)
            assert verdict.pages == 8
            with pytest.raises(GuestError, match="QEMU closed the line"):
                console.wait("nothing", timeout=5)
        thread.join()


def test_no_qemu(tmp_path: Path) -> None:
    with GuestConsole(tmp_path / "none") as console, pytest.raises(GuestError, match="no QEMU"):
        console.connected(timeout=0.2)


def test_fatal_ends_the_wait() -> None:
    console = GuestConsole(Path("/none"))
    console.messages = [Message(0.0, "fatal", (), {}, "UMEM-GUEST fatal mmap")]
    with pytest.raises(GuestError, match="fatal mmap"):
        console.wait("ready", timeout=5)


def test_netem_words() -> None:
    assert Link().netem() == ["limit", "20000", "delay", "0.2ms", "rate", "1gbit"]
    assert Link(rate=None, delay=None, loss="100%").netem() == ["limit", "20000", "loss", "100%"]


def test_qemu_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMEM_GUEST_KERNEL", "/k")
    monkeypatch.setenv("UMEM_GUEST_INITRD", "/i")
    args = GuestSpec(workload="ab", mb=10, extra=("-S",)).qemu_args(Path("/s"))
    assert args[args.index("-kernel") + 1] == "/k"
    assert args[args.index("-serial") + 1] == "unix:/s,server=on,wait=off"
    assert args[-1] == "-S"
    assert "umem.workload=ab umem.writers=1 umem.mb=10" in args[args.index("-append") + 1]
