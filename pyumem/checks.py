# SPDX-License-Identifier: GPL-2.0-or-later
"""What `umemctl check` looks at.

Each check says what it found and, when that is not right, the command that mends it.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyumem import runtime
from pyumem.areafs import FILESYSTEM, mounts
from pyumem.control import ControlClient
from pyumem.errors import UmemError
from pyumem.hello import load_token
from pyumem.qemu import DESTINATION_CAPABILITIES, SOURCE_CAPABILITIES
from pyumem.tls import DEFAULT_DIRECTORY, find_credentials
from pyumem.uapi import DEVICE

_QEMU_S: Final = 60
_LITTLE_MEMORY: Final = 512 << 20
_UNIT: Final = Path("/usr/lib/systemd/system/umem.socket")
_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"  # works, but look at it
    BAD = "bad"  # cannot work


@dataclass(frozen=True, slots=True)
class Finding:
    """One result.  fix is a command, empty when nothing is to be mended."""

    what: str
    level: Level
    text: str
    fix: str = ""


def _user() -> str:
    """Return the name of the user who asks."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _let_in(node: Path) -> str:
    """Return what root has to do so that the user who asks may use a device."""
    status = node.stat()
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    if not status.st_gid or status.st_mode & 0o060 != 0o060:
        return f"chgrp kvm {node} && chmod 660 {node}    # as root; for good by 60-umem.rules"
    return f"usermod -aG {group} {_user()}    # as root; then log in again"


def driver() -> Finding:
    """Is the driver there, for this user?"""
    node = Path(DEVICE)
    if not node.exists():
        return Finding(
            "driver",
            Level.BAD,
            f"{DEVICE} is not there: the driver is not loaded (needed to receive VMs)",
            "modprobe umem || insmod kmod/umem.ko",
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return Finding(
            "driver", Level.BAD, f"{DEVICE} cannot be opened by {_user()}", _let_in(node)
        )
    version = Path("/sys/module/umem/version")
    more = f", version {version.read_text().strip()}" if version.exists() else ""
    return Finding("driver", Level.OK, f"{DEVICE} is there and can be opened{more}")


def _ask_qemu(binary: str) -> tuple[str, set[str]]:
    """Return a QEMU binary's version and migration capabilities.  Raises UmemError."""
    questions = ("qmp_capabilities", "query-version", "query-migrate-capabilities", "quit")
    command = [binary, "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    try:
        done = subprocess.run(
            command,
            input="".join(json.dumps({"execute": q}) + "\n" for q in questions),
            capture_output=True,
            text=True,
            timeout=_QEMU_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UmemError(f"{binary}: {e}") from e
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    returned: list[Any] = [answer["return"] for answer in answers if "return" in answer]
    if len(returned) < len(questions) - 1:
        raise UmemError(f"{binary}: does not answer on QMP: {done.stderr.strip()[:200]}")
    number = returned[1]["qemu"]
    version = f"{number['major']}.{number['minor']}.{number['micro']}"
    return version, {one["capability"] for one in returned[2]}


def qemu(binary: str) -> Finding:
    """Is QEMU there, and does it know what a migration needs?"""
    if not shutil.which(binary):
        return Finding(
            "qemu", Level.BAD, f"{binary} is not installed", "apt-get install qemu-system-x86"
        )
    try:
        version, known = _ask_qemu(binary)
    except UmemError as e:
        return Finding("qemu", Level.BAD, str(e), f"{binary} -machine none -S -qmp stdio")
    if missing := sorted({*SOURCE_CAPABILITIES, *DESTINATION_CAPABILITIES} - known):
        return Finding(
            "qemu",
            Level.BAD,
            f"QEMU {version} does not know {', '.join(missing)}",
            "apt-get install qemu-system-x86    # 4.2 or later",
        )
    return Finding("qemu", Level.OK, f"QEMU {version} knows {', '.join(SOURCE_CAPABILITIES)}")


def kvm() -> Finding:
    """May this user use KVM?"""
    node = Path("/dev/kvm")
    if not node.exists():
        return Finding(
            "kvm", Level.NOTE, "no /dev/kvm: VMs are emulated", "modprobe kvm_intel kvm_amd"
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return Finding("kvm", Level.NOTE, f"/dev/kvm cannot be opened by {_user()}", _let_in(node))
    return Finding("kvm", Level.OK, "/dev/kvm can be opened")


def huge_pages() -> Finding:
    """Are huge pages kept out of shared memory?"""
    try:
        setting = _SHMEM_ENABLED.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return Finding("huge pages", Level.OK, "this kernel has none for shared memory")
    if setting in ("always", "within_size", "force"):
        return Finding(
            "huge pages",
            Level.NOTE,
            f"shmem_enabled is {setting}: a source's RAM may have huge pages where the guest "
            "touched little, and more is sent than needed (areas of the driver are not concerned)",
            f"echo advise > {_SHMEM_ENABLED}",
        )
    return Finding("huge pages", Level.OK, f"shmem_enabled is {setting}")


def memory() -> Finding:
    """Is there memory for a VM to come?"""
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(values["MemAvailable"].split()[0]) << 10
    text = f"{available >> 20} MiB of memory are available"
    if available < _LITTLE_MEMORY:
        return Finding(
            "memory", Level.NOTE, f"{text}: little for a VM", "free -m    # stop something"
        )
    return Finding("memory", Level.OK, text)


def ram_files() -> Finding:
    """Is there room for RAM files?"""
    where = runtime.ram_dir()
    while not where.exists():
        where = where.parent
    room = shutil.disk_usage(where).free
    text = f"{where} has room for {room >> 20} MiB of RAM files"
    if not os.access(where, os.W_OK):
        return Finding(
            "RAM files", Level.BAD, f"{where} cannot be written", "export UMEM_RAM_DIR=DIR"
        )
    if room < _LITTLE_MEMORY:
        return Finding("RAM files", Level.NOTE, text, "mount -o remount,size=75% /dev/shm")
    return Finding("RAM files", Level.OK, text)


def serve() -> Finding:
    """Does the daemon run?"""
    try:
        with ControlClient(runtime.serve_socket(), timeout=5.0) as client:
            answer = client.ask("status")
    except UmemError as e:
        fix = "umemctl serve &"
        if _UNIT.exists():
            fix = "systemctl enable --now umem.socket"
            if runtime.OF_HOST.exists() and not os.access(runtime.OF_HOST, os.X_OK):
                fix = f"usermod -aG kvm {_user()}    # as root; then log in again"
        return Finding("daemon", Level.NOTE, f"umemctl serve does not answer here ({e})", fix)
    return Finding("daemon", Level.OK, f"umemctl serve runs, pid {answer['pid']}")


def sockets() -> Finding:
    """May this user have sockets and records where the daemon looks for them?"""
    what = "runtime directory"
    try:
        where = runtime.runtime_dir()
        # Whichever of them is there already: what is missing is made in it.
        there = next(one for one in (where / "vm", where, *where.parents) if one.exists())
        runtime.make_private(there)
    except UmemError as e:
        return Finding(what, Level.BAD, str(e), "export UMEM_RUNTIME_DIR=DIR    # of your own")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        return Finding(
            what,
            Level.BAD,
            f"{there} cannot be written by {_user()}",
            f"usermod -aG kvm {_user()}    # as root, then log in again; or UMEM_RUNTIME_DIR=DIR",
        )
    return Finding(what, Level.OK, f"{where} can be used by {_user()}")


def area_files() -> Finding:
    """Can VMs that come give memory back?"""
    what = "area files"
    try:
        point = runtime.runtime_dir() / "areas"
    except UmemError as e:
        return Finding(what, Level.NOTE, str(e), "export UMEM_RUNTIME_DIR=DIR")
    if point in mounts():
        return Finding(what, Level.OK, f"{point} has the areas as files")
    if os.geteuid() == 0:
        return Finding(what, Level.OK, f"umemctl serve will have the areas as files in {point}")
    fix = f"mkdir -p {point} && mount -t {FILESYSTEM} {FILESYSTEM} {point}"
    if _UNIT.exists() and point.parent == runtime.OF_HOST:
        fix = "systemctl start run-umem-areas.mount"
    return Finding(
        what,
        Level.NOTE,
        f"no areas as files in {point}: VMs that come cannot give memory back by balloon",
        f"{fix}    # as root",
    )


def token() -> Finding:
    """Is there a token?"""
    try:
        found = load_token(None)
    except UmemError as e:
        fix = "chgrp kvm /etc/umem/token && chmod 640 /etc/umem/token    # as root"
        return Finding("token", Level.BAD, str(e), fix)
    if not found:
        return Finding(
            "token",
            Level.NOTE,
            "no /etc/umem/token: whoever reaches the port can send a VM",
            "install -d /etc/umem && (umask 027; openssl rand -hex 32 > /etc/umem/token; "
            "chgrp kvm /etc/umem/token)    # as root, the same file on both hosts",
        )
    return Finding("token", Level.OK, "/etc/umem/token is there")


def tls() -> Finding:
    """Are there TLS credentials, and do they work with one another?"""
    recipe = f"scripts/make-certificates.sh {DEFAULT_DIRECTORY} 365 {os.uname().nodename}"
    try:
        found = find_credentials(None)
        if found is None:
            return Finding(
                "tls",
                Level.NOTE,
                f"no {DEFAULT_DIRECTORY}: VMs move on this host only, or with --insecure",
                f"{recipe}    # and see Documentation/usage.rst: one CA for all hosts",
            )
        expires = found.rehearse()
    except UmemError as e:
        return Finding("tls", Level.BAD, str(e), recipe)
    return Finding("tls", Level.OK, f"{DEFAULT_DIRECTORY} can be used until {expires:%Y-%m-%d}")


def all_checks(binary: str) -> Iterator[Finding]:
    """Do all of them, one after the other."""
    yield driver()
    yield qemu(binary)
    checks: tuple[Callable[[], Finding], ...] = (
        *(kvm, huge_pages, memory, ram_files),
        *(sockets, area_files, tls, token, serve),
    )
    for check in checks:
        yield check()
