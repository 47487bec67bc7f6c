# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates for tests, made by the script that users are given."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "make-certificates.sh"


def make(directory: Path, *names: str, days: int = 30) -> Path:
    """Make credentials for names or addresses of hosts, of a new CA where there is none."""
    done = subprocess.run(
        ["sh", str(SCRIPT), str(directory), str(days), *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory


def for_localhost(factory: pytest.TempPathFactory) -> Path:
    """Credentials of one CA, made once in a run."""
    directory = factory.getbasetemp() / "tls"
    return directory if directory.exists() else make(directory, "localhost", "127.0.0.1")


def fingerprint(directory: Path, role: str) -> str:
    """What the other side sees of a "server" or "client"."""
    pem = (directory / f"{role}-cert.pem").read_text()
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
