# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of the greeting, and the token."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyumem import hello as messages
from pyumem.errors import ProtocolError, UsageError
from pyumem.hello import AreaSpec, Challenge, Hello, Lane, Welcome

HELLO = Hello(
    lane=Lane.CONTROL,
    session="0" * 32,
    vm="vm1",
    nonce="ab" * 32,
    software="umem 0",
    background_lanes=2,
    areas=(AreaSpec("ram0", 1 << 30, 4096), AreaSpec("ram1", 1 << 20, 4096)),
)


def test_messages_come_back() -> None:
    assert Hello.from_json(HELLO.to_json()) == HELLO
    challenge = Challenge("ab" * 32, "umem 0")
    assert Challenge.from_json(challenge.to_json()) == challenge
    welcome = Welcome("umem 0", "secret", "zstd")
    assert Welcome.from_json(welcome.to_json()) == welcome


def test_a_peer_that_knows_no_compression_has_none() -> None:
    hello, welcome = HELLO.to_json(), Welcome("umem 0", "", "zstd").to_json()
    del hello["compression"], welcome["compression"]
    assert Hello.from_json(hello).compression == Welcome.from_json(welcome).compression == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lane", "spare"),
        ("lane", 1),
        ("session", "0" * 31),
        ("session", "G" * 32),
        ("vm", "../etc"),
        ("vm", ""),
        ("vm", "x" * 64),
        ("nonce", ""),
        ("software", "x" * 300),
        ("index", -1),
        ("index", 1 << 40),
        ("index", True),
        ("background_lanes", 1000),
        ("compression", 1),
        ("areas", {}),
        ("areas", [3]),
        ("areas", [{"id": "ram0", "size_bytes": 0, "page_size_bytes": 4096}]),
        ("areas", [{"id": "ram0", "size_bytes": 1 << 70, "page_size_bytes": 4096}]),
        ("areas", [{"id": "ram 0", "size_bytes": 4096, "page_size_bytes": 4096}]),
        ("areas", [{"id": "a", "size_bytes": 4096, "page_size_bytes": 4096}] * 2),
        ("areas", [{"id": f"a{n}", "size_bytes": 1, "page_size_bytes": 1} for n in range(65)]),
    ],
)
def test_a_wrong_member_is_refused(key: str, value: object) -> None:
    for changed in ({**HELLO.to_json(), key: value}, {**HELLO.to_json(), key: None}):
        with pytest.raises(ProtocolError):
            Hello.from_json(changed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3),
)


@given(st.dictionaries(st.sampled_from(sorted(HELLO.to_json())), json_values))
def test_any_json_is_read_or_refused(message: dict[str, Any]) -> None:
    for parse in (Hello.from_json, Challenge.from_json, AreaSpec.from_json):
        with contextlib.suppress(ProtocolError):
            parse({**HELLO.to_json(), **message})


def test_the_mac_covers_everything() -> None:
    base = messages.mac(b"token", "source", "n1", b"text")
    assert messages.proven(base, messages.mac(b"token", "source", "n1", b"text"))
    for other in (
        messages.mac(b"token2", "source", "n1", b"text"),
        messages.mac(b"token", "destination", "n1", b"text"),
        messages.mac(b"token", "source", "n2", b"text"),
        messages.mac(b"token", "source", "n1", b"texT"),
        b"",
    ):
        assert not messages.proven(base, other)


def test_token_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "DEFAULT_TOKEN_FILE", tmp_path / "default")
    assert messages.load_token(None) == b""
    path = tmp_path / "token"
    with pytest.raises(UsageError, match="no such file"):
        messages.load_token(path)
    path.write_text(" secret\n")
    path.chmod(0o640)
    assert messages.load_token(path) == b"secret"
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod o="):
        messages.load_token(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(UsageError, match="empty"):
        messages.load_token(path)
    with pytest.raises(UsageError):
        messages.load_token(tmp_path)
    (tmp_path / "default").write_text("other")
    (tmp_path / "default").chmod(0o600)
    assert messages.load_token(None) == b"other"
