# SPDX-License-Identifier: GPL-2.0-or-later
"""umem-qemu with a shell script for a QEMU: files, locks, signals, exit status."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyumem import launcher, runtime
from pyumem.control import Asker, ControlServer
from pyumem.launcher import RamFiles

HOOK = Path(__file__).parents[2] / "qemu-hooks" / "umem-qemu"


class Host:
    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.env = {
            **os.environ,
            "UMEM_RUNTIME_DIR": str(tmp / "run"),
            "UMEM_RAM_DIR": str(tmp / "ram"),
        }
        self.qemu = tmp / "qemu"
        self.started: list[subprocess.Popen[str]] = []

    def script(self, text: str) -> None:
        """What QEMU does.  It leaves its arguments in `argv` first."""
        self.qemu.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {self.tmp}/argv.new\n"
            f"mv {self.tmp}/argv.new {self.tmp}/argv\n{text}\n"
        )
        self.qemu.chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(HOOK), str(self.qemu), *arguments],
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    def argv(self) -> list[str]:
        deadline = time.monotonic() + 30
        while not (self.tmp / "argv").exists():
            assert time.monotonic() < deadline, "QEMU was not started"
            time.sleep(0.02)
        return (self.tmp / "argv").read_text().splitlines()

    @property
    def ram(self) -> Path:
        return self.tmp / "ram" / "vm1" / "ram0"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host(tmp_path)
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("UMEM_RAM_DIR", str(tmp_path / "ram"))
    host.script("exit 0")
    yield host
    for process in host.started:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def test_ram_is_a_private_file_that_goes_with_qemu(host: Host) -> None:
    host.script("exec sleep 30")
    process = host.start("-name", "vm1", "-m", "64M")
    argv = host.argv()
    assert f"memory-backend-file,id=ram0,mem-path={host.ram},share=on,size={64 << 20}" in argv
    assert f"unix:{runtime.qmp_socket('vm1')},server=on,wait=off" in argv
    assert host.ram.stat().st_size == 64 << 20
    assert host.ram.stat().st_blocks == 0
    assert host.ram.stat().st_mode & 0o777 == 0o600
    assert runtime.vm_dir("vm1").stat().st_mode & 0o777 == 0o700
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "umemctl migrate -p tcp:HOST:PORT --vm vm1" in err
    assert not host.ram.parent.exists() and not runtime.vm_dir("vm1").exists()


def test_several_blocks(host: Host) -> None:
    """Each on a file, in its own directory where the user names one; all go with QEMU."""
    huge, own = host.tmp / "huge", host.tmp / "own"
    huge.mkdir()
    own.touch()
    host.script("exec sleep 30")
    objects = [
        "memory-backend-ram,id=a,size=1M",
        f"memory-backend-file,id=b,size=2M,mem-path={huge}",
        f"memory-backend-file,id=c,size=1M,mem-path={own},share=on",
    ]
    process = host.start("-name", "vm1", *(word for one in objects for word in ("-object", one)))
    argv = host.argv()
    theirs = host.tmp / "ram" / "vm1"
    for name, path, size in (("a", theirs / "a", 1), ("b", huge / "vm1/b", 2), ("ram0", None, 128)):
        path = path or theirs / name
        assert f"memory-backend-file,id={name},mem-path={path},share=on,size={size << 20}" in argv
        assert path.stat().st_size == size << 20
    assert objects[2] in argv, "a shared file of the user's is left alone"
    (theirs / "dimm").touch()
    process.terminate()
    process.wait(30)
    assert not theirs.exists(), "with what was put beside it"
    assert huge.exists() and not list(huge.iterdir()) and own.exists()


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill $$", 143)]
)
def test_the_exit_status_is_qemus(host: Host, script: str, status: int) -> None:
    host.script(script)
    assert host.run("-name", "vm1")[0] == status
    assert not host.ram.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_to_qemu(host: Host, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    host.script(f"trap 'exit 42' {name}\ntouch {host.tmp}/trap\nwhile :; do sleep 0.05; done")
    process = host.start("-name", "vm1")
    deadline = time.monotonic() + 30
    while not (host.tmp / "trap").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 42


def test_a_name_in_use_is_refused_and_nothing_is_harmed(host: Host) -> None:
    host.script("exec sleep 30")
    host.start("-name", "vm1", "-m", "1M")
    host.argv()
    inode = host.ram.stat().st_ino
    status, err = host.run("-name", "vm1", "-m", "2M")
    assert status == 1 and "a VM named vm1 runs already" in err
    assert host.ram.stat().st_ino == inode and host.ram.stat().st_size == 1 << 20


def test_any_name_goes_with_any_other(host: Host) -> None:
    """Neither is the name of a file that belongs to the other."""
    host.script("exec sleep 30")
    host.start("-name", "vm1", "-m", "1M")
    host.argv()
    host.script("exit 0")
    assert host.run("-name", "vm1.lock", "-m", "1M")[0] == 0


def test_directories_that_cannot_be_made(host: Host) -> None:
    (host.tmp / "run").write_text("")
    status, err = host.run("-name", "vm1", "-m", "1M")
    assert status == 1 and err.count("\n") == 1
    assert f"cannot make {host.tmp}/run/lock: Not a directory" in err


def test_the_name_stays_taken_when_the_launcher_is_killed(host: Host) -> None:
    host.script(f"echo $$ > {host.tmp}/pid; exec sleep 30")
    process = host.start("-name", "vm1", "-m", "1M")
    host.argv()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while not (host.tmp / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    status, err = host.run("-name", "vm1", "-m", "2M")
    assert status == 1 and "runs already" in err
    os.kill(int((host.tmp / "pid").read_text()), signal.SIGKILL)
    time.sleep(0.1)
    host.script("exit 0")
    assert host.run("-name", "vm1", "-m", "2M")[0] == 0, "what was left is used again"


def test_ram_that_is_served_is_left_to_who_serves_it(host: Host) -> None:
    host.script(f"while [ ! -e {host.tmp}/go ]; do sleep 0.02; done")
    process = host.start("-name", "vm1", "-m", "1M")
    host.argv()
    record = runtime.make_private(runtime.migrate_dir()) / "vm1.json"
    with host.ram.open("rb") as served:  # as umemctl migrate does
        fcntl.flock(served, fcntl.LOCK_SH)
        record.touch()
        (host.tmp / "go").touch()
        assert process.wait(30) == 0
        record.unlink()
        assert host.ram.exists()
        status, err = host.run("-name", "vm1", "-m", "1M")
        assert status == 3 and "still served by `umemctl migrate`" in err
    assert host.run("-name", "vm1", "-m", "1M")[0] == 0
    assert not host.ram.exists()


def test_the_only_copy_of_a_vm_is_not_overwritten(host: Host) -> None:
    runtime.make_private(runtime.migrate_dir())
    runtime.commit_record("vm1").write_text("{}")
    host.ram.parent.mkdir(parents=True)
    host.ram.write_bytes(b"precious")
    status, err = host.run("-name", "vm1")
    assert status == 3 and "may need the memory kept here" in err
    assert host.ram.read_bytes() == b"precious"


def test_ram_goes_with_a_migration_that_fails_with_its_qemu(host: Host) -> None:
    """Neither of the two leaves it to the other."""
    host.script(f"while [ ! -e {host.tmp}/go ]; do sleep 0.02; done")
    process = host.start("-name", "vm1", "-m", "1M")
    host.argv()
    with host.ram.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        (host.tmp / "go").touch()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.wait(30) == 0
    assert not host.ram.parent.exists()


def test_a_signal_before_qemu_is_there_leaves_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends umem-qemu in order, though its default would be an end without one."""
    create = RamFiles.create

    def and_signal(ram: RamFiles) -> None:
        create(ram)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RamFiles, "create", and_signal)
    before = {number: signal.getsignal(number) for number in launcher._FORWARDED}
    try:
        assert launcher.main([str(host.qemu), "-name", "vm1", "-m", "1M"]) == 128 + signal.SIGTERM
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    assert not (host.tmp / "argv").exists(), "QEMU was not started"
    assert not host.ram.parent.exists() and not runtime.vm_dir("vm1").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "what"),
    [
        (["-m", "x"], 2, "not a size"),
        (["-object", "memory-backend-ram,id=a,size=1"], 2, "multiple of 64 KiB"),
        (["-mem-path", "/dev/null"], 3, "/dev/null needs share=on"),
        (["-postcopy"], 2, "-incoming tcp:HOST:PORT"),
    ],
)
def test_one_line_says_what_is_wrong(
    host: Host, arguments: list[str], status: int, what: str
) -> None:
    got, err = host.run(*arguments)
    assert got == status and what in err and err.count("\n") == 1
    assert not (host.tmp / "argv").exists()


def test_no_such_qemu(host: Host) -> None:
    host.qemu.unlink()
    status, err = host.run("-name", "vm1", "-m", "1M")
    assert status == 127 and "No such file" in err
    assert not host.ram.exists()


def test_help() -> None:
    done = subprocess.run([HOOK, "--help"], capture_output=True, text=True, check=True)
    assert "-postcopy-flags 0|1" in done.stdout and "Examples:" in done.stdout
    assert subprocess.run([HOOK], capture_output=True, check=False).returncode == 2


# --- a VM that is expected ---

EXPECT = ("-name", "vm1", "-m", "64M", "-postcopy", "-incoming", "tcp:0:4444")


def test_without_the_driver(host: Host) -> None:
    if Path("/dev/umem").exists():
        pytest.skip("the driver is loaded")
    status, err = host.run(*EXPECT)
    assert status == 1 and err.count("\n") == 1
    assert "load the driver first (modprobe umem, or insmod" in err


@pytest.fixture
def driver(host: Host, tmp_path: Path) -> Path:
    """Let the launcher take an ordinary file for the control node."""
    (tmp_path / "umem").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import pyumem.uapi\npyumem.uapi.DEVICE = {str(tmp_path / 'umem')!r}\n"
    )
    root = str(HOOK.parents[1])
    host.env["PYTHONPATH"] = f"{tmp_path / 'site'}:{root}"
    return tmp_path / "umem"


@pytest.mark.usefixtures("driver")
def test_without_the_daemon(host: Host) -> None:
    status, err = host.run(*EXPECT)
    assert status == 1 and err.count("\n") == 1
    assert "start `umemctl serve` first" in err


class FakeServe:
    """Answers the launcher's one question."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.ready = threading.Event()
        self._stop: Any = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    def _run(self) -> None:
        import asyncio

        async def handler(question: dict[str, Any], asker: Asker) -> dict[str, Any]:
            self.asked.append(question)
            self.asker = asker
            task = asyncio.create_task(asker.gone.wait())
            task.add_done_callback(lambda _: self.left.set())
            self.task = task
            if "error" in self.answer:
                from pyumem.errors import ControlError

                raise ControlError(self.answer["error"])
            return self.answer

        async def main() -> None:
            runtime.make_private(runtime.runtime_dir())
            self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
            async with ControlServer(runtime.serve_socket(), handler):
                self.ready.set()
                await self.end.wait()

        asyncio.run(main())

    def tell(self, event: str, **more: object) -> None:
        self.loop.call_soon_threadsafe(lambda: self.asker.tell(event, **more))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join(10)


@pytest.mark.usefixtures("driver")
def test_ram_comes_from_the_daemon(host: Host) -> None:
    serve = FakeServe({"areas": [{"id": "ram0", "path": "/dev/umem7", "size_bytes": 64 << 20}]})
    host.script("exec sleep 30")
    process = host.start(*EXPECT, "-postcopy-flags", "1", "-S")
    argv = host.argv()
    assert f"memory-backend-file,id=ram0,mem-path=/dev/umem7,share=on,size={64 << 20}" in argv
    assert argv[-3:] == ["-incoming", "defer", "-S"]
    assert not serve.left.is_set(), "the connection shows that the launcher lives"
    process.terminate()
    process.communicate(timeout=30)
    assert serve.left.wait(10)
    serve.close()
    (question,) = serve.asked
    assert json.loads(json.dumps(question)) == {
        "command": "incoming",
        "name": "vm1",
        "listen": "tcp:0:4444",
        "areas": [{"id": "ram0", "size_bytes": 64 << 20, "page_size_bytes": 4096}],
        "qmp": str(runtime.qmp_socket("vm1")),
        "incoming": str(runtime.incoming_socket("vm1")),
        "autostart": False,
        "touch": True,
    }
    assert not host.ram.exists()


@pytest.mark.usefixtures("driver")
def test_the_daemon_says_no(host: Host) -> None:
    serve = FakeServe({"error": "cannot listen on tcp:0:4444: Address already in use"})
    status, err = host.run(*EXPECT)
    serve.close()
    assert status == 1 and "Address already in use" in err and err.count("\n") == 1
    assert not (host.tmp / "argv").exists()


AREAS = {"areas": [{"id": "ram0", "path": "/dev/umem7", "size_bytes": 64 << 20}]}


@pytest.mark.usefixtures("driver")
def test_a_daemon_that_is_gone_takes_a_waiting_qemu_with_it(host: Host) -> None:
    serve = FakeServe(AREAS)
    host.script("exec sleep 30")
    process = host.start(*EXPECT)
    host.argv()
    serve.close()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the VM did not arrive, its QEMU was ended: `umemctl serve` is gone" in err


@pytest.mark.usefixtures("driver")
def test_a_vm_that_does_not_come_is_an_error_with_a_reason(host: Host) -> None:
    serve = FakeServe(AREAS)
    host.script("trap 'exit 0' TERM; while :; do sleep 0.05; done")
    process = host.start(*EXPECT)
    host.argv()
    serve.tell("given-up", reason="the source gave up: no disk")
    _, err = process.communicate(timeout=30)
    serve.close()
    assert process.returncode == 1
    assert "the source gave up: no disk" in err


@pytest.mark.usefixtures("driver")
def test_a_vm_that_arrived_does_not_end_with_the_daemon(host: Host) -> None:
    serve = FakeServe(AREAS)
    host.script(f"while [ ! -e {host.tmp}/go ]; do sleep 0.05; done; exit 7")
    process = host.start(*EXPECT)
    host.argv()
    serve.tell("arrived")
    serve.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    (host.tmp / "go").touch()
    assert process.wait(30) == 7


@pytest.mark.usefixtures("driver")
def test_a_qemu_that_ends_by_itself_has_its_own_status(host: Host) -> None:
    serve = FakeServe(AREAS)
    host.script("exit 0")
    assert host.run(*EXPECT)[0] == 0
    serve.close()


@pytest.mark.usefixtures("driver")
def test_serve_may_see_first_that_qemu_is_dying(host: Host) -> None:
    serve = FakeServe(AREAS)
    host.script("trap '' TERM; sleep 1; kill -KILL $$")
    process = host.start(*EXPECT)
    host.argv()
    serve.tell("given-up", reason="the destination's QEMU is gone")
    _, err = process.communicate(timeout=30)
    serve.close()
    assert process.returncode == 128 + signal.SIGKILL
    assert "did not arrive" not in err


def test_records_that_cannot_be_read_end_no_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon died, its records are not for this user: the VM may have arrived."""
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    assert not launcher._has_arrived("vm1")
    (tmp_path / "incoming").mkdir()
    assert not launcher._has_arrived("vm1")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert launcher._has_arrived("vm1")
