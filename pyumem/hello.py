# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of the greeting: what each side says of itself, checked field by field, and the token
that proves it.

The destination speaks first (CHALLENGE with a nonce).  The source answers HELLO, whose JSON is
covered by HMAC-SHA256(token, "source" | nonce | JSON) and has a nonce of its own; WELCOME is
covered the same way, so that each side knows that the other has the token before a byte of guest
memory moves.  Without a token the key is empty.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyumem.errors import ProtocolError, UsageError
from pyumem.wire import MAX_LANES

DEFAULT_TOKEN_FILE: Final = Path("/etc/umem/token")
NONCE_SIZE: Final = 32
MAC_SIZE: Final = hashlib.sha256().digest_size
MAX_AREAS: Final = 64
MAX_TOKEN: Final = 4096

_NAME: Final = re.compile(r"[A-Za-z0-9._:+-]{1,63}")
_SESSION: Final = re.compile(r"[0-9a-f]{32}")
_NONCE: Final = re.compile(rf"[0-9a-f]{{{2 * NONCE_SIZE}}}")


class Lane(StrEnum):
    """What a connection is for."""

    CONTROL = "control"
    URGENT = "urgent"
    BACKGROUND = "background"
    PRECOPY = "precopy"


def valid_name(name: str) -> bool:
    """Tell whether a VM or a RAM block may have this name: it becomes a directory and a part of an
    area's name.
    """
    return _NAME.fullmatch(name) is not None and name not in {".", ".."}


# --- reading JSON with care ---


def text(message: dict[str, Any], key: str, *, longest: int = 256) -> str:
    """Return a string member.  Raises ProtocolError."""
    value = message.get(key)
    if not isinstance(value, str) or len(value) > longest:
        raise ProtocolError(f"{key!r} is missing or not a string of at most {longest} characters")
    return value


def whole(message: dict[str, Any], key: str, low: int, high: int) -> int:
    """Return an integer member within low..high.  Raises ProtocolError."""
    value = message.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(f"{key!r} is missing or not a number within {low}..{high}")
    return value


def flag(message: dict[str, Any], key: str) -> bool:
    """Return a boolean member.  Raises ProtocolError."""
    value = message.get(key)
    if not isinstance(value, bool):
        raise ProtocolError(f"{key!r} is missing or not true or false")
    return value


def _matching(message: dict[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = text(message, key)
    if not pattern.fullmatch(value):
        raise ProtocolError(f"{key!r} has a wrong form: {value[:80]!r}")
    return value


def _compression(message: dict[str, Any]) -> str:
    """Return that member.  A peer that does not know of it has none.  Raises ProtocolError."""
    return text(message, "compression") if "compression" in message else ""


# --- the messages ---


@dataclass(frozen=True, slots=True)
class AreaSpec:
    """One RAM block: QEMU's id of its memory back end, size and page size in bytes."""

    id: str
    size: int
    page_size: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"id": self.id, "size_bytes": self.size, "page_size_bytes": self.page_size}

    @classmethod
    def from_json(cls, message: object) -> AreaSpec:
        """Check and read the JSON form.  Raises ProtocolError."""
        if not isinstance(message, dict):
            raise ProtocolError("an area is not a JSON object")
        return cls(
            _matching(message, "id", _NAME),
            whole(message, "size_bytes", 1, 1 << 56),
            whole(message, "page_size_bytes", 1, 1 << 40),
        )


@dataclass(frozen=True, slots=True)
class Challenge:
    """First word of the destination."""

    nonce: str
    software: str
    tls: bool = False
    """A control lane has to go on under TLS.  (Who is not known yet is not told the version.)"""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"nonce": self.nonce, "software": self.software, "tls": self.tls}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Challenge:
        """Check and read the JSON form.  Raises ProtocolError."""
        return cls(
            _matching(message, "nonce", _NONCE), text(message, "software"), flag(message, "tls")
        )


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the destination says to a connection that it takes."""

    software: str
    lane_secret: str = ""
    """Under TLS, on the control lane: the token of its page lanes, whose greeting is in clear."""
    compression: str = ""
    """On a background lane: what of HELLO's offer may be used; empty for none."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "software": self.software,
            "lane_secret": self.lane_secret,
            "compression": self.compression,
        }

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Welcome:
        """Check and read the JSON form.  Raises ProtocolError."""
        return cls(text(message, "software"), text(message, "lane_secret"), _compression(message))


@dataclass(frozen=True, slots=True)
class Hello:
    """What the source says of a connection.  areas and background_lanes count on the control lane
    only.
    """

    lane: Lane
    session: str
    vm: str
    nonce: str
    software: str
    index: int = 0
    background_lanes: int = 0
    areas: tuple[AreaSpec, ...] = field(default=())
    resume: bool = False
    """On the control lane: take a committed migration up again; VERDICT is the answer."""
    confirm: bool = False
    """On the control lane: say every now and then, with HAVE, which pages have come."""
    compression: str = ""
    """On a background lane: how pages may come, if the destination takes it; empty for plain."""
    precopy_lanes: int = 0
    """On the control lane: so many lanes for rounds of pre-copy come too, and CLEAN after them."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "lane": self.lane.value,
            "session": self.session,
            "vm": self.vm,
            "nonce": self.nonce,
            "software": self.software,
            "index": self.index,
            "background_lanes": self.background_lanes,
            "areas": [area.to_json() for area in self.areas],
            "resume": self.resume,
            "confirm": self.confirm,
            "compression": self.compression,
            "precopy_lanes": self.precopy_lanes,
        }

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Hello:
        """Check and read the JSON form.  Raises ProtocolError."""
        try:
            lane = Lane(text(message, "lane"))
        except ValueError:
            raise ProtocolError(f"unknown lane {message['lane']!r}") from None
        areas = message.get("areas")
        if not isinstance(areas, list) or len(areas) > MAX_AREAS:
            raise ProtocolError(f"'areas' is missing or no list of at most {MAX_AREAS}")
        specs = tuple(AreaSpec.from_json(area) for area in areas)
        if len({spec.id for spec in specs}) != len(specs):
            raise ProtocolError("two areas have the same id")
        return cls(
            lane=lane,
            session=_matching(message, "session", _SESSION),
            vm=_matching(message, "vm", _NAME),
            nonce=_matching(message, "nonce", _NONCE),
            software=text(message, "software"),
            index=whole(message, "index", 0, MAX_LANES - 1),
            background_lanes=whole(message, "background_lanes", 0, MAX_LANES),
            areas=specs,
            resume=flag(message, "resume"),
            confirm=flag(message, "confirm"),
            compression=_compression(message),
            precopy_lanes=whole(message, "precopy_lanes", 0, MAX_LANES),
        )


# --- the token ---


def load_token(path: Path | None) -> bytes:
    """Read the shared token: the file named, else the default one if it exists, else none (empty).

    White space around it does not count.  Raises UsageError for a file that cannot be read, is
    empty or readable by all.
    """
    chosen = path or DEFAULT_TOKEN_FILE
    try:
        with chosen.open("rb") as file:
            token = file.read(MAX_TOKEN + 1).strip()
    except FileNotFoundError:
        if path is None:
            return b""
        raise UsageError(f"token file {chosen}: no such file") from None
    except OSError as e:
        raise UsageError(f"token file {chosen}: {e.strerror}") from None
    if not token or len(token) > MAX_TOKEN:
        raise UsageError(f"token file {chosen}: empty, or longer than {MAX_TOKEN} bytes")
    if chosen.stat().st_mode & 0o007:
        raise UsageError(f"token file {chosen} is open to everybody: chmod o= {chosen}")
    return token


def mac(token: bytes, who: str, nonce: str, payload: bytes) -> bytes:
    """Return what proves that `who` ("source" or "destination") has the token and wrote the payload
    for this nonce.
    """
    return hmac.new(
        token, who.encode() + b"\0" + nonce.encode() + b"\0" + payload, hashlib.sha256
    ).digest()


def proven(expected: bytes, given: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(expected, given)
