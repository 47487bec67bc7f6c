# SPDX-License-Identifier: GPL-2.0-or-later
"""The test machine keeps its promises; each test here boots one, from the host."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vm import harness

pytestmark = pytest.mark.timeout(240)


def boot(name: str, command: str, *options: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "tests.vm", "run", "--name", name, "--timeout", "200"]
    argv += [*options, "--shell-command", command]
    return subprocess.run(argv, cwd=harness.ROOT, capture_output=True, text=True, check=False)


def test_promises_and_status() -> None:
    marker = harness.BUILD / "vm" / "written-in-the-machine"
    marker.unlink(missing_ok=True)
    command = f"""
        set -e
        test "$(id -u)" = 0 && test "$PWD" = "{harness.ROOT}" && touch "{marker}"
        test -c /dev/umem && test -c /dev/kvm && modprobe sch_netem
        for where in /tmp /run /dev/shm; do test "$(stat -f -c %T $where)" = tmpfs; done
        test "$(command -v python)" = "{harness.ROOT}/.venv/bin/python"
        test "$UMEM_KERNEL" = 6.1 && case $(uname -r) in 6.1.*) ;; *) exit 1 ;; esac
        for file in "$UMEM_QEMU" "$UMEM_QEMU10" "$UMEM_GUEST_KERNEL" "$UMEM_GUEST_INITRD"
        do test -e "$file"; done
        echo "said by the command"; echo "and on stderr" >&2; exit 3
    """
    done = boot("self-status", command)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "said by the command" in done.stdout
    assert "and on stderr" in done.stdout
    assert marker.exists()
    marker.unlink()


def test_a_warning_in_the_kernel_log_fails() -> None:
    done = boot("self-warning", "echo 'WARNING: test' >/dev/kmsg; exit 0")
    assert done.returncode == harness.EXIT_DIRTY_LOG, done.stderr
    assert "WARNING: test" in done.stderr
    log = Path(harness.BUILD) / "vm" / "self-warning.log"
    assert "WARNING: test" in log.read_text()


def test_a_broken_kernel_ends_the_machine_at_once() -> None:
    started = time.monotonic()
    command = "sysctl -qw kernel.panic_on_oops=0; echo c >/proc/sysrq-trigger; sleep 180"
    done = boot("self-oops", command)
    assert done.returncode == harness.EXIT_DIRTY_LOG, done.stderr
    assert time.monotonic() - started < 150


def test_a_command_that_takes_too_long_is_ended() -> None:
    done = boot("self-timeout", "sleep 600", "--timeout", "45", "--no-module")
    assert done.returncode == harness.EXIT_TIMEOUT, done.stderr


def test_processors_see_code_that_was_patched() -> None:
    """With an emulator that gets this wrong the machine dies within seconds ("Oops: int3")."""
    done = boot("self-patching", "python tests/harness/patching.py 10")
    assert done.returncode == 0, done.stdout + done.stderr
    patched = re.search(r"patched (\d+) times", done.stdout)
    assert patched and int(patched[1]) > 20
