# SPDX-License-Identifier: GPL-2.0-or-later
"""The inner guest boots and checks its memory; needs neither driver nor umemctl."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.vm.flaky import EMULATED_KVM
from tests.vm.guest import GuestConsole, GuestSpec
from tests.vm.hosts import Link, two_hosts


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("accel", "vcpus"),
    # The translator knows nothing of the kernel below; test_whole boots one on the other kernel.
    [
        pytest.param("kvm", 2, marks=EMULATED_KVM),
        pytest.param("tcg", 1, marks=pytest.mark.one_kernel),
    ],
)
def test_boots_and_gives_a_verdict(accel: str, vcpus: int, tmp_path: Path) -> None:
    spec = GuestSpec(
        workload="verify", writers=vcpus, mb=16, memory="96M", vcpus=vcpus, accel=accel
    )
    serial = tmp_path / "serial"
    started = time.monotonic()
    argv = [os.environ["UMEM_QEMU"], *spec.qemu_args(serial)]
    with subprocess.Popen(argv) as qemu, GuestConsole(serial) as console:
        try:
            console.wait("ready", timeout=spec.boot_timeout)
            print(f"{accel}: ready after {time.monotonic() - started:.1f} s")
            console.wait("verify", timeout=60)
            verdict = console.verdict()
        finally:
            qemu.kill()
    assert verdict.ok, verdict.text
    assert verdict.pages == 16 * 256
    assert verdict.bad == 0


def test_both_qemus_run() -> None:
    for variable, version in (("UMEM_QEMU", "version 7.2"), ("UMEM_QEMU10", "version 10.")):
        argv = [os.environ[variable], "--version"]
        assert version in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_two_hosts_and_the_link_between_them() -> None:
    with two_hosts(Link(rate="1gbit", delay="20ms")) as (source, destination):
        ping = source.run(["ping", "-c", "2", "-q", destination.address])
        if "not found" in ping.stderr or ping.returncode == 127:
            pytest.skip("no ping here")
        assert ping.returncode == 0, ping.stdout + ping.stderr
        # rtt min/avg/max/mdev = 40.2/...: the delay is paid in both directions.
        least = float(ping.stdout.split("= ")[1].split("/")[0])
        assert 40.0 <= least < 100.0
        assert source.tx_bytes() > 0
        destination.set_link(Link(rate=None, delay=None, loss="100%"))
        assert source.run(["ping", "-c", "1", "-W", "1", destination.address]).returncode != 0
