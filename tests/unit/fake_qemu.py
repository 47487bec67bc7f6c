# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that speaks QMP without being QEMU, and what a test needs to run it.

    python fake_qemu.py SOCKET RAM BEHAVIOUR

maps the file RAM (none when empty) and answers on SOCKET as the JSON object BEHAVIOUR says:

    answers      what a command returns, {} where it is not named
    refuses      commands that are an error
    deaf         `quit` is not heard
    mute_s       seconds before the first client is greeted
    events       events that are told after the greeting
"""

from __future__ import annotations

import contextlib
import json
import mmap
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": [],
    },
}


def _say(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.sendall(json.dumps(message).encode() + b"\r\n")


def _questions(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """Nothing but its own end separates one question from the next."""
    decoder, text = json.JSONDecoder(), ""
    while data := sock.recv(65536):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                question, end = decoder.raw_decode(text)
            except ValueError:
                break
            text = text[end:].lstrip()
            yield question


def _serve(sock: socket.socket, behaviour: dict[str, Any], log: Path) -> None:
    _say(sock, GREETING)
    for question in _questions(sock):
        command = question["execute"]
        with log.open("a") as file:
            file.write(command + "\n")
        if command == "quit" and behaviour.get("deaf"):
            continue
        if command in behaviour.get("refuses", ()):
            error = {"class": "GenericError", "desc": "no"}
            _say(sock, {"error": error, "id": question.get("id")})
            continue
        answer = behaviour.get("answers", {}).get(command, {})
        _say(sock, {"return": answer, "id": question.get("id")})
        if command == "quit":
            sys.exit(0)
        if command == "qmp_capabilities":
            for event in behaviour.get("events", ()):
                _say(sock, {**event, "timestamp": {"seconds": 0, "microseconds": 0}})


def main() -> None:
    path, ram, behaviour = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if ram:
        with open(ram, "r+b") as file:  # noqa: PTH123
            mapped = mmap.mmap(file.fileno(), 0)
    with socket.socket(socket.AF_UNIX) as listener:
        # Its name appears when somebody may connect, not before.
        hidden = path.with_suffix(".new")
        listener.bind(str(hidden))
        listener.listen()
        hidden.rename(path)
        time.sleep(behaviour.get("mute_s", 0))
        while True:
            sock, _ = listener.accept()
            with contextlib.suppress(OSError), sock:
                _serve(sock, behaviour, path.with_suffix(".log"))
    del mapped


class FakeQemu:
    """One of them, as its test sees it."""

    def __init__(self, directory: Path, ram: Path | None, behaviour: dict[str, Any]) -> None:
        self.qmp = directory / "qmp.sock"
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.qmp, str(ram or ""), json.dumps(behaviour)]
        )
        deadline = time.monotonic() + 20
        while not self.qmp.exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.01)

    def heard(self) -> list[str]:
        """The commands that came so far."""
        log = self.qmp.with_suffix(".log")
        return log.read_text().split() if log.exists() else []


@contextlib.contextmanager
def fake_qemu(directory: Path, ram: Path | None = None, **behaviour: object) -> Iterator[FakeQemu]:
    """Run one; it is ended with the block."""
    fake = FakeQemu(directory, ram, behaviour)
    try:
        yield fake
    finally:
        fake.process.kill()
        fake.process.wait()


if __name__ == "__main__":
    main()
