# SPDX-License-Identifier: GPL-2.0-or-later
"""Control sockets: questions, answers, and what is neither."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from pyumem.control import MAX_LINE, Asker, ControlClient, ControlServer
from pyumem.errors import ControlError, UsageError


async def handler(question: dict[str, Any], asker: Asker) -> dict[str, Any]:
    if question["command"] == "fail":
        raise UsageError("no such thing")
    if question["command"] == "leave":
        asyncio.get_running_loop().create_task(note(asker))
    if question["command"] == "stay":
        asyncio.get_running_loop().call_later(0.05, tell, asker)
    return {"said": question}


seen: list[str] = []


async def note(asker: Asker) -> None:
    await asker.gone.wait()
    seen.append("gone")


def tell(asker: Asker) -> None:
    asker.tell("news", what=1)
    asker.dismiss()


def serve_while(path: Path, work: Any) -> Any:  # noqa: ANN401
    async def main() -> object:
        async with ControlServer(path, handler):
            result = await asyncio.to_thread(work)
            await asyncio.sleep(0.05)
            return result

    return asyncio.run(main())


def test_question_and_answer(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def work() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with ControlClient(path) as client:
            assert client.ask("echo", a=1)["said"] == {"command": "echo", "a": 1}
            with pytest.raises(ControlError, match="no such thing"):
                client.ask("fail")
            assert client.ask("again")["ok"] is True

    serve_while(path, work)
    assert not path.exists()


def test_the_server_sees_the_client_leave(tmp_path: Path) -> None:
    def work() -> None:
        with ControlClient(tmp_path / "s") as client:
            client.ask("leave")

    seen.clear()
    serve_while(tmp_path / "s", work)
    assert seen == ["gone"]


def test_who_stays_is_told_more(tmp_path: Path) -> None:
    def work() -> None:
        with ControlClient(tmp_path / "s") as client:
            assert client.ask("stay")["ok"]
            assert client.listen() == {"event": "news", "what": 1}
            with pytest.raises(ControlError, match="closed the connection"):
                client.listen()

    serve_while(tmp_path / "s", work)


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"nonsense", b'{"command": 3}', b"\xff", b'{"command":']
)
def test_bad_questions_get_an_answer(tmp_path: Path, line: bytes) -> None:
    def work() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "s"))
            sock.sendall(line + b"\n")
            return sock.recv(10000)

    answer = json.loads(serve_while(tmp_path / "s", work))
    assert answer["ok"] is False and answer["error"]


def test_an_endless_line_is_cut_off(tmp_path: Path) -> None:
    def work() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(tmp_path / "s"))
            try:
                sock.sendall(b"x" * (3 * MAX_LINE))
                return sock.recv(100)
            except (BrokenPipeError, ConnectionResetError):
                return b""

    assert serve_while(tmp_path / "s", work) == b""


def test_a_socket_that_was_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with pytest.raises(ControlError, match="Connection refused"):
        ControlClient(path)
    serve_while(path, lambda: ControlClient(path).close())


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"none.*No such file"):
        ControlClient(tmp_path / "none")
