# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things of this host live: the runtime directory, its sockets and locks, and the RAM files
of VMs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pyumem.errors import ControlError, UmemError, UsageError, of_system
from pyumem.hello import valid_name

OF_HOST: Final = Path("/run/umem")
"""The runtime directory of root, and of all who run VMs where the host was set up for that
(systemd/umem.tmpfiles.conf).
"""


def runtime_dir() -> Path:
    """Return $UMEM_RUNTIME_DIR, else /run/umem for root and for those who may have VMs there, else
    $XDG_RUNTIME_DIR/umem.

    Raises UsageError when none of them is known.
    """
    if path := os.environ.get("UMEM_RUNTIME_DIR"):
        return Path(path).absolute()
    if os.geteuid() == 0 or os.access(OF_HOST / "vm", os.W_OK | os.X_OK, effective_ids=True):
        return OF_HOST
    if path := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(path) / "umem"
    raise UsageError("set UMEM_RUNTIME_DIR or XDG_RUNTIME_DIR: sockets need a directory")


def ram_dir() -> Path:
    """Return where RAM files of VMs are made: $UMEM_RAM_DIR, else a directory in /dev/shm."""
    if path := os.environ.get("UMEM_RAM_DIR"):
        return Path(path).absolute()
    return Path("/dev/shm/umem" if os.geteuid() == 0 else f"/dev/shm/umem-{os.geteuid()}")


def ram_mark(path: Path) -> Path:
    """Return the file that says, next to a RAM file, that umem-qemu made it."""
    return path.with_name("made-by-umem-qemu")


def remove_ram(path: Path) -> None:
    """Remove a RAM file if umem-qemu made it, and its directory with the last of them; leave any
    other alone.
    """
    mark = ram_mark(path)
    if mark.exists():
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if list(path.parent.iterdir()) == [mark]:
                mark.unlink()
                path.parent.rmdir()


def make_private(path: Path) -> Path:
    """Make a directory, and its parents, that only this user enters.

    Raises UsageError for one that somebody else owns or may write: what is in it could be swapped;
    UmemError for one that cannot be made.
    """
    try:
        for one in (*reversed(path.parents), path):
            with contextlib.suppress(FileExistsError):
                one.mkdir(mode=0o700)
    except OSError as e:
        raise UmemError(f"cannot make {one}: {e.strerror}") from e
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path} is no directory")
    for one in (path, *path.parents):
        status = one.lstat()
        if status.st_uid not in (os.geteuid(), 0):
            raise UsageError(f"{one} belongs to uid {status.st_uid}: refusing to use {path}")
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise UsageError(f"{one} can be written by others: refusing to use {path}")
    return path


def let_daemon_in(path: Path) -> bool:
    """Let the daemon of the host into a VM's directory, if it is another user than we are.

    The directory's default ACL, inherited from the one that it is in, names that user; the mode
    that make_private() asked for masks it, and as "group" it is allowed in.  Nothing happens, and
    False is returned, where there is no such ACL.  Raises UmemError.
    """
    try:
        os.getxattr(path, "system.posix_acl_default")
    except OSError:
        return False  # ENODATA, or a file system without ACLs
    try:
        path.chmod(0o750)
    except OSError as e:
        raise of_system(e) from e
    return True


def let_daemon_connect(path: Path) -> bool:
    """Let it connect to a socket in there, which QEMU's umask forbids: the kernel applies that to
    sockets in spite of the ACL.  Tells whether the socket was there.
    """
    try:
        path.chmod(0o770)
    except OSError:
        return False
    return True


def check_name(name: str) -> str:
    """Return the VM's name.  Raises UsageError when it cannot name a directory and an area."""
    if not valid_name(name):
        raise UsageError(
            f"{name!r} cannot be a VM's name here: 1 to 63 of letters, digits, '._:+-'"
        )
    return name


def serve_socket() -> Path:
    """Return the control socket of `umemctl serve`."""
    return runtime_dir() / "serve.sock"


def vm_dir(name: str) -> Path:
    """Return the directory of a VM that was started by umem-qemu."""
    return runtime_dir() / "vm" / check_name(name)


def vm_lock(name: str) -> Path:
    """Return the lock of a VM's name.  Not where the VMs' directories are: any name may be one."""
    return runtime_dir() / "lock" / check_name(name)


def qmp_socket(name: str) -> Path:
    """Return the QMP socket of a VM that was started by umem-qemu."""
    return vm_dir(name) / "qmp.sock"


def incoming_socket(name: str) -> Path:
    """Return where a waiting QEMU takes its device state from."""
    return vm_dir(name) / "incoming.sock"


def migrate_dir() -> Path:
    """Return the directory of running `umemctl migrate`s: NAME.sock, NAME.json."""
    return runtime_dir() / "migrate"


def commit_record(name: str) -> Path:
    """Return the file that says that this VM is about to leave, or has left and still needs its RAM
    from here: see pyumem.commit_record.
    """
    return migrate_dir() / f"{check_name(name)}.json"


def has_left(name: str) -> bool:
    """Tell whether a VM of this name may run elsewhere and need its RAM from here."""
    try:
        record = json.loads(commit_record(name).read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # whatever it was, it is not for us to say that nobody needs it
    return not isinstance(record, dict) or record.get("committed") is not False


def reports_dir() -> Path:
    """Return the directory of reports of migrations that are over: see pyumem.reports."""
    return runtime_dir() / "reports"


class LockFile:
    """An exclusive flock on a file of its own: who holds it is alive.  A context manager."""

    def __init__(self, path: Path, what: str) -> None:
        """Name the file and what it protects, for the error."""
        self._path = path
        self._what = what
        self._fd = -1

    def __enter__(self) -> Self:
        """Take it.  Raises ControlError, with the holder's pid if known, when it is taken."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ControlError(f"{self._path}: {e.strerror}") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            raise ControlError(
                f"{self._what} (pid {holder or 'unknown'} holds {self._path})"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        return self

    def fileno(self) -> int:
        """Return the descriptor that holds the lock, to be inherited."""
        return self._fd

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go.  The file stays: removing it would race with the next holder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file that others see as it was or as it is, never half of it.

    The directory is a tmpfs, as a rule: it and the processes that it tells of end together, so
    that nothing is forced to a disk.  Raises UmemError.
    """
    new = path.with_suffix(".new")
    try:
        # In one line: a VM stands still meanwhile, and only that way it is json's C code.
        new.write_text(json.dumps(record) + "\n")
        new.replace(path)
    except OSError as e:
        raise of_system(e) from e
