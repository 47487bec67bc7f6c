# SPDX-License-Identifier: GPL-2.0-or-later
"""Options and forms of output that commands share."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pyumem.errors import ControlError, UsageError
from pyumem.hello import load_token
from pyumem.tls import DEFAULT_DIRECTORY, Security, find_credentials

_F = TypeVar("_F", bound=Callable[..., Any])


def json_option(function: _F) -> _F:
    """Add --json."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object; numbers name their unit."
    )(function)


def security_options(function: _F) -> _F:
    """Add --token-file, --tls-creds and --insecure."""
    for option in (
        click.option(
            "--insecure",
            is_flag=True,
            envvar="UMEM_INSECURE",
            help="Use any network, in clear: whoever is on it can read the guest's memory, and "
            "change it.  Environment: UMEM_INSECURE=1.",
        ),
        click.option(
            "--tls-creds",
            type=click.Path(path_type=Path, file_okay=False),
            envvar="UMEM_TLS_CREDS",
            help="Directory with ca-cert.pem and server- or client-cert.pem and -key.pem, as "
            "QEMU's tls-creds-x509: the peer has to have a certificate of the same CA.  Default: "
            f"{DEFAULT_DIRECTORY} if it is there.  Without, only this host itself is talked to.  "
            "Environment: UMEM_TLS_CREDS.",
        ),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="File with the secret that both hosts share.  Default: /etc/umem/token if it is "
            "there, else no secret.",
        ),
    ):
        function = option(function)
    return function


def security_of(
    token_file: Path | None, tls_creds: Path | None, *, insecure: bool, tls_hostname: str = ""
) -> Security:
    """Return what the options say.  Raises UsageError."""
    if insecure and tls_creds:
        raise UsageError("--insecure and --tls-creds exclude each other")
    return Security(
        load_token(token_file),
        None if insecure else find_credentials(tls_creds),
        insecure,
        tls_hostname,
    )


_MAX_BANDWIDTH = 1 << 50


def _bandwidth_of(text: str) -> int | None:
    """Return bytes per second; None for no limit.  click.BadParameter for what is neither."""
    if text.lower() == "none":
        return None
    number, suffix = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not re.fullmatch("[0-9]{1,16}", number) or suffix not in ("", *"KMG"):
        raise click.BadParameter(f"{text!r} is no rate such as 500K, 100M, 2G or none")
    bytes_s = int(number) << 10 * " KMG".index(suffix or " ")
    if not 0 < bytes_s <= _MAX_BANDWIDTH:
        raise click.BadParameter(f"{text!r} is out of range")
    return bytes_s


def max_bandwidth_option(function: _F) -> _F:
    """Add --max-bandwidth."""
    return click.option(
        "--max-bandwidth",
        default="none",
        show_default=True,
        metavar="RATE",
        callback=lambda _ctx, _param, text: _bandwidth_of(text),
        help="Limit of the background transfer, all lanes together, in bytes per second, with K, M "
        "or G (powers of 1024) as in QEMU.  Requested pages are never limited.",
    )(function)


def bandwidth(value: object) -> int | None:
    """Check a limit that came over a control socket.  Raises ControlError."""
    if value is None or (type(value) is int and 0 < value <= _MAX_BANDWIDTH):
        return value
    raise ControlError(f"no bandwidth: {value!r}")


def print_json(value: object) -> None:
    """Print it, indented for people, still one value for programs."""
    click.echo(json.dumps(value, indent=2))


def quiet_qmp() -> None:
    """Keep qemu.qmp's own log off the screen: what matters of it comes as an error."""
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


def plain(text: object) -> str:
    """Return text of a peer so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def size(nr_bytes: float) -> str:
    """Return a size for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nr_bytes < 1024 or unit == "TiB":
            return f"{nr_bytes:.0f} {unit}" if unit == "B" else f"{nr_bytes:.1f} {unit}"
        nr_bytes /= 1024
    raise AssertionError


def share(part: float, whole: float) -> str:
    """Return a share in percent for people."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
