# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may talk to whom: mutual TLS 1.3 with certificates in a directory laid out as QEMU's
(tls-creds-x509), or an explicit word that there is none.

    ca-cert.pem                       who may sign; both sides
    ca-crl.pem                        what is revoked; if it is there
    server-cert.pem, server-key.pem   the destination (`umemctl serve`)
    client-cert.pem, client-key.pem   the source (`umemctl migrate`)

The control lane's handshake is done by the daemon; a page lane's by the worker that owns the socket
(pyumem.lanes.tls_link), since a TLS connection cannot be handed to another process.  A page lane
has to come with the secret that WELCOME gave on the control lane, and with the certificate that was
seen there.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyumem.address import Address
from pyumem.errors import LinkError, RefusedError, UsageError

DEFAULT_DIRECTORY: Final = Path("/etc/pki/umem")
_CA: Final = "ca-cert.pem"
_CRL: Final = "ca-crl.pem"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A directory of certificates.

    Contexts are made anew for each use: a certificate that was renewed counts from the next
    connection on.
    """

    directory: Path

    def server_context(self) -> ssl.SSLContext:
        """Return what a destination needs.  Raises UsageError that names the file."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER, "server")
        context.verify_mode = ssl.CERT_REQUIRED
        # A ticket makes a socket readable with nothing to read, and nobody takes a session up
        # again.
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return what a source needs.  Raises UsageError that names the file."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT, "client")

    def rehearse(self) -> datetime.datetime:
        """Have this host's client talk to this host's server, in memory.

        Returns when the first of the two certificates expires.  Raises UsageError.
        """
        client_context = self.client_context()
        client_context.check_hostname = False
        pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context.wrap_bio(pipes[0], pipes[1])
        server = self.server_context().wrap_bio(pipes[1], pipes[0], server_side=True)
        try:
            # Client's hello; server's answer; client's certificate; all is well.
            for end in (client, server, client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        except ssl.SSLCertVerificationError as e:
            raise UsageError(f"{self.directory}: {e.verify_message}") from None
        except ssl.SSLError as e:
            raise UsageError(f"{self.directory}: {_why(e)}") from None
        return min(_expiry(client), _expiry(server))

    def _context(self, protocol: int, role: str) -> ssl.SSLContext:
        certificate = self.directory / f"{role}-cert.pem"
        key = self.directory / f"{role}-key.pem"
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        for path in (self.directory / _CA, certificate, key):
            _readable(path)
        if key.stat().st_mode & 0o007:
            raise UsageError(f"{key} is open to everybody: chmod o= {key}")
        try:
            context.load_verify_locations(self.directory / _CA)
        except ssl.SSLError as e:
            raise UsageError(f"{self.directory / _CA}: no CA certificate: {_why(e)}") from None
        crl = self.directory / _CRL
        if crl.exists():
            try:
                context.load_verify_locations(crl)
            except ssl.SSLError as e:
                raise UsageError(f"{crl}: no revocation list: {_why(e)}") from None
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as e:
            raise UsageError(f"{certificate} and {key.name}: {_why(e)}") from None
        return context


@dataclass(frozen=True, slots=True)
class Security:
    """What a side asks of its peers."""

    token: bytes = b""
    """Both sides have to know it; empty: none."""
    credentials: Credentials | None = None
    """TLS with these; None: in clear."""
    insecure: bool = False
    """In clear over any network: somebody said so."""
    tls_hostname: str = ""
    """What the destination's certificate is for, where that is not the name it is reached by."""

    def admits(self, address: Address) -> bool:
        """Tell whether this side may be reached at, or talk to, an address: without TLS, and
        without a word of the user's, only from and to this host itself.

        A name that cannot be resolved is none of this host's.
        """
        return self.credentials is not None or self.insecure or is_loopback(address)

    def check_destination(self, address: Address) -> None:
        """Raise UsageError for a destination that a VM is not to be sent to."""
        if not self.admits(address):
            raise UsageError(
                f"{address} is on a network and there are no TLS credentials: give --tls-creds "
                "DIR, or --insecure to send the guest's memory in clear"
            )

    def describe(self) -> str:
        """Return it in a few words, for a log."""
        known = "and a token" if self.token else "no token"
        if self.credentials:
            return f"TLS with {self.credentials.directory}, {known}"
        if self.insecure:
            return f"in clear over any network (--insecure), {known}"
        return f"this host only (no TLS credentials), {known}"


@dataclass(frozen=True, slots=True)
class LaneTls:
    """What a page lane's worker has to know for its handshake."""

    directory: Path
    server_side: bool
    hostname: str
    """What the server's certificate is for; empty at the server itself."""
    peer: str
    """Fingerprint of the certificate that the control lane's peer had."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, for a worker's start message."""
        return {
            "directory": str(self.directory),
            "server_side": self.server_side,
            "hostname": self.hostname,
            "peer": self.peer,
        }

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> LaneTls:
        """Read the JSON form."""
        return cls(
            Path(message["directory"]),
            message["server_side"],
            message["hostname"],
            message["peer"],
        )


@dataclass(frozen=True, slots=True)
class LaneSecurity:
    """What the control lane found out for the page lanes of its migration."""

    token: bytes
    """What a page lane's greeting has to prove: under TLS the secret of WELCOME."""
    tls: LaneTls | None = None

    def to_json(self) -> dict[str, Any] | None:
        """Return the "tls" member of a worker's start message."""
        return self.tls.to_json() if self.tls else None


def is_loopback(address: Address) -> bool:
    """Tell whether an address is on no network: all that its host stands for is loopback."""
    if not address.host:
        return False
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(at[0]).split("%")[0]).is_loopback for *_, at in found)


def find_credentials(directory: Path | None) -> Credentials | None:
    """Return those of the directory named, else those of the default one, if it is there.

    Raises UsageError for a directory that is named and not there.
    """
    if directory is None:
        try:
            there = (DEFAULT_DIRECTORY / _CA).exists()
        except PermissionError:
            there = True  # who may not look is told so when they are used
        return Credentials(DEFAULT_DIRECTORY) if there else None
    if not directory.is_dir():
        raise UsageError(f"--tls-creds {directory}: no such directory")
    return Credentials(directory)


def fingerprint(peer: ssl.SSLObject | ssl.SSLSocket) -> str:
    """Return the SHA-256 of the peer's certificate, in hexadecimal.  Raises RefusedError."""
    certificate = peer.getpeercert(binary_form=True)
    if not certificate:
        raise RefusedError("the peer has no certificate")
    return hashlib.sha256(certificate).hexdigest()


def trouble(peer: str, e: OSError) -> LinkError | RefusedError:
    """Return an error of a TLS connection as one of ours.

    What a certificate is refused for, here or there, does not get better when it is tried again.
    """
    if isinstance(e, ssl.SSLCertVerificationError):
        return RefusedError(f"{peer}: its certificate is not accepted: {e.verify_message}")
    if isinstance(e, ssl.SSLError):
        reason = _why(e)
        if "alert" in reason or "certificate" in reason:
            return RefusedError(
                f"{peer}: refused this host's certificate, or TLS as such: {reason}"
            )
        return LinkError(f"{peer}: TLS: {reason}")
    return LinkError(f"{peer}: {e.strerror or e}")


def _why(e: ssl.SSLError) -> str:
    """Return OpenSSL's reason in small words."""
    return (e.reason or str(e)).replace("_", " ").lower()


def _expiry(end: ssl.SSLObject) -> datetime.datetime:
    peer = end.getpeercert()
    assert peer
    seconds = ssl.cert_time_to_seconds(str(peer["notAfter"]))
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _no_password() -> str:
    raise UsageError("TLS: keys with a password cannot be used: a daemon has nobody to ask")


def _readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}") from None
