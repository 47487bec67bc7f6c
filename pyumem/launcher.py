# SPDX-License-Identifier: GPL-2.0-or-later
"""umem-qemu: runs stock QEMU with RAM that can be migrated by post-copy, and cleans up after it.

    umem-qemu qemu-system-x86_64 -m 1G ...                                    RAM on an area of its
    own, or on a file where the driver is not
    umem-qemu qemu-system-x86_64 -m 1G ... -postcopy -incoming tcp:0:4444     RAM on an area of
    `umemctl serve`

It stays as QEMU's parent, with QEMU's exit status, since somebody has to remove the RAM file when
QEMU is gone; unless `umemctl migrate` still serves it, which then removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from pyumem import runtime
from pyumem.control import ControlClient
from pyumem.errors import CheckError, ControlError, UmemError, UsageError, of_system
from pyumem.hello import AreaSpec
from pyumem.qemu_backends import Backend
from pyumem.qemu_cmdline import Wish, parse, rewrite
from pyumem.uapi import DEVICE, PAGE_SIZE

_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SERVE_ANSWER_S: Final = 120.0
"""It may have to be started first: the socket is there before the daemon."""
_DECISION_S: Final = 60.0
"""Seconds after QEMU's end in which a migration that has not committed has to give up."""
_LOOK_S: Final = 0.05
_QEMU_END_S: Final = 10.0
"""Seconds between SIGTERM and SIGKILL for a QEMU whose VM does not come."""

USAGE: Final = """\
Usage: umem-qemu QEMU [ARGUMENTS...]

Run stock QEMU so that its VM can leave this host, or come to it, by post-copy.

  QEMU                     a qemu-system-... binary; its own options stay as they are
  -postcopy                with -incoming: expect a VM by post-copy; `umemctl serve` must run
  -postcopy-flags 0|1      0: default; 1: map pages for the guest as they come
  -incoming tcp:HOST:PORT  where to expect it; HOST 0 is any address, none is loopback

QEMU's QMP socket for `umemctl migrate` is $UMEM_RUNTIME_DIR/vm/NAME/qmp.sock (/run/umem for root),
NAME being that of -name.

UMEM_RAM=area|file|auto says what the RAM of a VM that may leave is: an area of the driver, which
pre-copy needs, or a file, for `umemctl migrate -p` alone.  auto, the default, is an area if there
is a driver that this user may use.

Examples:
  umem-qemu qemu-system-x86_64 -name vm1 -m 1G -accel kvm -drive file=disk.qcow2
  umem-qemu qemu-system-x86_64 -name vm1 -m 1G -accel kvm -drive file=disk.qcow2 \\
      -postcopy -incoming tcp:0:4444 -monitor stdio

See umemctl --help for the rest.
"""


def say(text: str) -> None:
    """Print a line for the user; standard output is QEMU's."""
    print(f"umem-qemu: {text}", file=sys.stderr, flush=True)


class Signals:
    """Passes signals on to QEMU.  One that comes before it is there keeps it from being started.

    Made before anything else: a signal whose default is to end this process would leave RAM file
    and lock behind.
    """

    def __init__(self) -> None:
        """Take them from now on."""
        self.first = 0
        """The first one, 0 before it."""
        self.process: subprocess.Popen[bytes] | None = None
        for number in _FORWARDED:
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.first = self.first or number
        if self.process is not None:
            self.process.send_signal(number)

    def pass_to(self, process: subprocess.Popen[bytes]) -> None:
        """Send them to this process from now on."""
        self.process = process
        if self.first:
            process.send_signal(self.first)


class RamFiles:
    """The files that are a VM's RAM, mode 0600: DIRECTORY/NAME/ID for each block that needs one."""

    def __init__(self, name: str, blocks: Sequence[Backend]) -> None:
        """Choose their places.

        A directory of the user's (of a hugetlbfs, perhaps) is taken for ours, a shared file is left
        alone.  Raises CheckError for a file that is not shared.
        """
        self._name = name
        self._files: list[tuple[Path, int]] = []
        self.paths: Final[dict[str, str]] = {}
        for block in blocks:
            given = Path(block.mem_path) if block.mem_path else None
            if given and not given.is_dir():
                if not block.keeps_file:
                    raise CheckError(f"RAM block {block.id}: {given} needs share=on")
                continue
            path = (given.absolute() if given else runtime.ram_dir()) / name / block.id
            self.paths[block.id] = str(path)
            self._files.append((path, block.size))

    def create(self) -> None:
        """Make them, all zero, replacing such as nobody uses any more.

        Raises CheckError, UmemError.
        """
        for path in self._all():
            self._take_over(path)
        try:
            for path, size in self._files:
                runtime.make_private(path.parent)
                runtime.ram_mark(path).touch(mode=0o600)
                room = shutil.disk_usage(path.parent).free
                with path.open("xb") as file:
                    os.fchmod(file.fileno(), 0o600)
                    file.truncate(size)
                if room < size:
                    say(
                        f"warning: {path.parent} has room for {room >> 20} MiB, the VM may use "
                        f"{size >> 20} MiB (mount -o remount,size=... /dev/shm, or set "
                        "UMEM_RAM_DIR)"
                    )
        except BaseException as e:
            for made, _ in self._files:
                runtime.remove_ram(made)
            if isinstance(e, OSError):
                raise UmemError(f"RAM file {path}: {e.strerror}") from e
            raise

    def _all(self) -> Iterator[Path]:
        """Find what is there of them, and what the user put beside them for a DIMM to plug in."""
        for directory in {path.parent for path, _ in self._files}:
            mark = runtime.ram_mark(directory / "any")
            if mark.exists():
                yield from (path for path in directory.iterdir() if path != mark)

    @staticmethod
    def _take_over(path: Path) -> None:
        with path.open("rb") as old:
            try:
                fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckError(
                    f"{path} is still served by `umemctl migrate`: use another -name"
                ) from None
        path.unlink()

    @property
    def moved(self) -> bool:
        """Tell whether `umemctl migrate` took the VM away: it left a record, or took the files."""
        gone = [path for path, _ in self._files if not path.exists()]
        return runtime.has_left(self._name) or bool(gone)

    def remove_unless_served(self) -> None:
        """Remove them, unless they are the only copy of a VM elsewhere, or still served."""
        deadline = time.monotonic() + _DECISION_S
        for path in self._all():
            self._remove_unless_served(path, deadline)

    def _remove_unless_served(self, path: Path, deadline: float) -> None:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            # A migration that holds it and has not committed fails now, since QEMU is gone.
            while not runtime.has_left(self._name):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        return
                    time.sleep(_LOOK_S)
                else:
                    runtime.remove_ram(path)
                    return


class RamAreas:
    """Areas of the driver that are a VM's RAM: pre-copy can tell what the guest writes to them.

    Whole from the start, so nobody serves them; they live while this process or QEMU has them open.
    """

    def __init__(self, name: str, blocks: Sequence[Backend]) -> None:
        """Make them.  Raises DriverError, UmemError, OSError."""
        # Not at the top: it costs a start its time.
        from pyumem.area import Area
        from pyumem.areafs import mount

        self.paths: Final[dict[str, str]] = {}
        self._fds: list[int] = []
        directory = runtime.runtime_dir() / "areas"
        # It stays mounted: a daemon may have come to use it by the time that we end.
        if problem := mount(directory):
            say(f"the VM cannot give memory back by balloon ({problem})")
        try:
            for block in blocks:
                with Area.create(f"{name}.{block.id}", block.size) as area:
                    area.mark([(0, area.npages)])
                    path = area.node if problem else str(directory / area.name)
                    self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
                    self.paths[block.id] = path
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of them."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _make_areas(name: str, blocks: Sequence[Backend]) -> RamAreas | None:
    """Return areas for a VM's RAM, or None where files have to do.

    UMEM_RAM is area, file or auto, which is the default.  Raises UmemError when areas are wanted
    and cannot be had.
    """
    wanted = os.environ.get("UMEM_RAM", "auto")
    if wanted not in ("auto", "area", "file"):
        raise UsageError(f"UMEM_RAM={wanted}: area, file or auto")
    given = [block.id for block in blocks if block.mem_path]
    if given and wanted == "area":
        raise UsageError(f"UMEM_RAM=area, but the command line says where {given[0]} is to be")
    if wanted == "file" or given or (wanted == "auto" and not os.access(DEVICE, os.R_OK | os.W_OK)):
        return None
    try:
        return RamAreas(name, blocks)
    except (UmemError, OSError) as e:
        if wanted == "area":
            raise
        say(f"{e}: RAM is a file, so no pre-copy but only `umemctl migrate -p`")
        return None


def _refuse_lost(name: str) -> None:
    """Raise CheckError when RAM under this name is what a VM elsewhere still needs."""
    if runtime.has_left(name):
        raise CheckError(
            f"{runtime.commit_record(name)} says that a VM {name} runs elsewhere and may need the "
            f"memory kept here (`umemctl migrate --resume --vm {name}`); remove that file when it "
            "does not, or use another -name"
        )


def _ask_serve(wish: Wish, name: str) -> tuple[ControlClient, dict[str, str]]:
    """Get areas from `umemctl serve`.

    Returns the connection, to be kept open, and for each RAM block's id a path.
    """
    assert wish.postcopy_from is not None
    if not Path(DEVICE).exists():
        raise UmemError(
            f"{DEVICE} is not there: load the driver first (modprobe umem, or insmod kmod/umem.ko)"
        )
    try:
        client = ControlClient(runtime.serve_socket(), timeout=_SERVE_ANSWER_S)
    except ControlError as e:
        raise UmemError(f"no daemon answers ({e}): start `umemctl serve` first") from e
    try:
        answer = client.ask(
            "incoming",
            name=name,
            listen=str(wish.postcopy_from),
            areas=[AreaSpec(block.id, block.size, PAGE_SIZE).to_json() for block in wish.blocks],
            qmp=str(runtime.qmp_socket(name)),
            incoming=str(runtime.incoming_socket(name)),
            autostart=wish.autostart,
            touch=wish.touch_pages,
        )
        return client, {str(area["id"]): str(area["path"]) for area in answer["areas"]}
    except BaseException:
        client.close()
        raise


def _has_arrived(name: str) -> bool:
    """Tell whether a daemon that is gone had taken the VM before it could tell us so."""
    # Not at the top: it is needed when a daemon dies, and importing it costs a start its time.
    from pyumem.incoming_record import directory, left_behind

    where = directory()
    if where.exists() and not os.access(where, os.R_OK | os.X_OK):
        return True  # nobody knows that it had not, and a guest may run
    return any(record.name == name and record.ours for record in left_behind())


def _until_arrival(
    process: subprocess.Popen[bytes], serve: ControlClient, name: str, sockets: set[Path]
) -> str:
    """Wait until the VM has arrived, or QEMU has ended; let the daemon connect to sockets as they
    appear.

    Without `umemctl serve` there will be no VM: QEMU would wait for ever, and is ended.  Returns
    why, empty if it was not, also when a signal of somebody else ended QEMU and serve only saw that
    first.
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(serve, select.POLLIN)
        while not (ready := poll.poll(1000 * _LOOK_S if sockets else None)):
            sockets = {one for one in sockets if not runtime.let_daemon_connect(one)}
        if pidfd in (fd for fd, _ in ready):
            return ""
    finally:
        os.close(pidfd)
    try:
        said = serve.listen()
        if said.get("event") == "arrived":
            return ""
        reason = str(said.get("reason"))
    except ControlError:
        if _has_arrived(name):
            return ""
        reason = "`umemctl serve` is gone"
    process.terminate()
    ours = {0, -signal.SIGTERM}
    try:
        process.wait(_QEMU_END_S)
    except subprocess.TimeoutExpired:
        process.kill()  # it sleeps in the fault of a page that nobody brings
        ours.add(-signal.SIGKILL)
    status = process.wait()
    return "" if status < 0 and status not in ours else reason


def _run_qemu(
    argv: Sequence[str],
    signals: Signals,
    keep: int,
    serve: ControlClient | None,
    name: str,
    sockets: set[Path],
) -> int:
    """Run QEMU with this terminal and return its exit status, or 1 if its VM did not arrive.

    serve is the connection to the daemon that a VM is expected through, sockets are those of QEMU's
    that the daemon, another user, has to reach.  QEMU inherits the descriptor `keep`, the lock on
    the VM's name: should this launcher be killed, the name stays taken while QEMU lives.
    """
    if signals.first:
        return 128 + signals.first
    try:
        process = subprocess.Popen(argv, pass_fds=(keep,))
    except OSError as e:
        say(f"{argv[0]}: {e.strerror}")
        return 127 if isinstance(e, FileNotFoundError) else 126
    signals.pass_to(process)
    why = _until_arrival(process, serve, name, sockets) if serve else ""
    status = process.wait()
    if why:
        say(f"the VM did not arrive, its QEMU was ended: {why}")
        return 1
    return 128 - status if status < 0 else status


def _launch(wish: Wish, signals: Signals) -> int:
    name = wish.name or f"vm-{os.getpid()}"
    lock_path = runtime.vm_lock(name)
    runtime.make_private(lock_path.parent)
    ram: RamFiles | None = None
    serve: ControlClient | None = None
    with (
        runtime.LockFile(lock_path, f"a VM named {name} runs already: use another -name") as lock,
        contextlib.ExitStack() as stack,
    ):
        # Not before the lock is ours: whoever had it removes this directory at its end.
        directory = runtime.make_private(runtime.vm_dir(name))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        sockets: set[Path] = set()
        if wish.postcopy_from:
            if runtime.let_daemon_in(directory):
                sockets = {runtime.qmp_socket(name), runtime.incoming_socket(name)}
            serve, paths = _ask_serve(wish, name)
            # Open as long as QEMU runs: each side sees the other's end.
            stack.callback(serve.close)
            where = ", ".join(paths.values())
            say(f"VM {name} is expected on {wish.postcopy_from}, its RAM is {where}")
        else:
            _refuse_lost(name)
            if areas := _make_areas(name, wish.blocks):
                stack.callback(areas.close)
                paths = areas.paths
            else:
                ram = RamFiles(name, wish.blocks)
                ram.create()
                stack.callback(ram.remove_unless_served)
                paths = ram.paths
            how = "--hybrid" if areas else "-p"
            say(f"VM {name}: umemctl migrate {how} tcp:HOST:PORT --vm {name}")
        argv = rewrite(wish, name=name, paths=paths, qmp_path=str(runtime.qmp_socket(name)))
        status = _run_qemu(argv, signals, lock.fileno(), serve, name, sockets)
        moved = ram.moved if ram else runtime.has_left(name)
        if status == 128 + signal.SIGKILL and moved:
            say(f"VM {name} has moved to another host")
            return 0
        return status


def main(argv: Sequence[str] | None = None) -> int:
    """Be umem-qemu; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "-help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        return _launch(parse(arguments), Signals())
    except UmemError as e:
        say(str(e))
        return e.exit_status
    except OSError as e:
        say(str(of_system(e)))
        return 1
