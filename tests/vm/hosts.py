# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts in one machine: network namespaces with a slow link between them.

    with two_hosts(Link(rate="1gbit", delay="0.2ms")) as (source, destination):
        destination.popen(["umemctl", "serve"])
        source.run(["umemctl", "migrate", "-p", f"tcp:{destination.address}:4444"])

A host is a name, an address and a runtime directory of its own
(UMEM_RUNTIME_DIR); its processes share everything else with the machine.
Needs root, `ip`, `tc`, `nsenter`.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

DEVICE = "umem0"
_File = int | IO[Any] | None


@dataclass(frozen=True)
class Link:
    """What tc-netem does to each direction of the link; None leaves it out."""

    rate: str | None = "1gbit"
    delay: str | None = "0.2ms"
    loss: str | None = None

    def netem(self) -> list[str]:
        """Return the arguments after `tc qdisc ... netem`."""
        # Room for more than the bandwidth-delay product of any link used here,
        # so that netem delays and never drops by itself.
        words = ["limit", "20000"]
        for name in ("delay", "rate", "loss"):
            value = getattr(self, name)
            if value is not None:
                words += [name, value]
        return words


@dataclass
class Host:
    """One side: run programs on it with `popen` and `run`."""

    name: str
    address: str
    runtime: Path
    """Value of UMEM_RUNTIME_DIR for every program of this host."""
    device: str = DEVICE
    """Its end of the link."""
    extra_env: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """Name of the network namespace."""
        return f"umem-{self.name}"

    def env(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment that a program of this host gets."""
        return {
            **os.environ,
            "UMEM_RUNTIME_DIR": str(self.runtime),
            **self.extra_env,
            **(more or {}),
        }

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs ARGV here; the process stays one."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *argv]

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: _File = subprocess.DEVNULL,
        stdout: _File = None,
        stderr: _File = None,
        text: bool = True,
        pass_fds: Sequence[int] = (),
    ) -> "subprocess.Popen[Any]":
        """Start a program; its pid is that of the program itself."""
        return subprocess.Popen(
            self.argv(argv),
            env=self.env(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            pass_fds=pass_fds,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = False,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end and return what it printed, in .stdout and .stderr."""
        return subprocess.run(
            self.argv(argv),
            env=self.env(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def set_link(self, link: Link) -> None:
        """Change what happens to the packets that this host sends."""
        tc = ["tc", "qdisc", "replace", "dev", self.device, "root", "netem", *link.netem()]
        self.run(tc, check=True)

    def link_up(self, up: bool) -> None:
        """Pull or plug this host's cable."""
        self.run(["ip", "link", "set", self.device, "up" if up else "down"], check=True)

    def tx_bytes(self) -> int:
        """Return how many bytes this host has sent so far, all headers included."""
        shown = self.run(["ip", "-j", "-s", "link", "show", self.device], check=True)
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(
    link: Link | None = None, network: str = "10.77.0", prefix: str = ""
) -> Iterator[tuple[Host, Host]]:
    """Give (source, destination) with a link between them; takes all down after.

    Programs still running on them are the caller's to end.  PREFIX tells apart
    pairs that live at the same time, which then need different networks too.
    """
    link = link or Link()
    with _namespaces(f"{prefix}src", f"{prefix}dst") as (source, destination):
        yield _wire(source, destination, network, DEVICE, link)


@contextlib.contextmanager
def three_hosts(link: Link | None = None) -> Iterator[list[tuple[Host, Host]]]:
    """Give three hosts a, b, c as the pairs (a, b), (b, c), (c, a), each with a link of its own.

    A host is the same in both of its pairs, but for its address and device.
    """
    link = link or Link()
    with _namespaces("a", "b", "c") as (a, b, c):
        yield [
            _wire(one, other, f"10.77.{n}", f"umem{n}", link)
            for n, (one, other) in enumerate(((a, b), (b, c), (c, a)))
        ]


@contextlib.contextmanager
def _namespaces(*names: str) -> Iterator[list[Host]]:
    base = Path(tempfile.mkdtemp(prefix="umem-hosts-", dir="/run"))
    hosts = [Host(name, "", base / name) for name in names]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        for host in hosts:
            host.runtime.mkdir(mode=0o700)
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "del", host.namespace)
            host.run(["ip", "link", "set", "lo", "up"], check=True)
        yield hosts


def _wire(one: Host, other: Host, network: str, device: str, link: Link) -> tuple[Host, Host]:
    """Lay a link between two hosts.  Returns them as its two ends."""
    ends = (
        replace(one, address=f"{network}.1", device=device),
        replace(other, address=f"{network}.2", device=device),
    )
    _ip(
        *("link", "add", device, "netns", one.namespace, "type", "veth"),
        *("peer", "name", device, "netns", other.namespace),
    )
    for host in ends:
        host.run(["ip", "addr", "add", f"{host.address}/24", "dev", device], check=True)
        host.link_up(True)
        host.set_link(link)
    return ends
