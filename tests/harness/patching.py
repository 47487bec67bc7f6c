# SPDX-License-Identifier: GPL-2.0-or-later
"""Run in the machine by test_vm.py: has the kernel patch its scheduler while it is used.

The first KVM machine that comes and the last one that goes switch a static key in __schedule();
pairs of processes that wake each other keep both processors there.
"""

import fcntl
import os
import signal
import sys
import time

KVM_CREATE_VM = 0xAE01
PAIRS = 4


def ping_pong() -> None:
    ours, theirs = os.pipe(), os.pipe()
    if os.fork() == 0:
        while True:
            os.write(theirs[1], os.read(ours[0], 1))
    while True:
        os.write(ours[1], b"x")
        os.read(theirs[0], 1)


def main() -> None:
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(PAIRS):
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            ping_pong()
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    rounds, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        os.close(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
        rounds += 1
    print(f"patched {2 * rounds} times", flush=True)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    os.setpgid(0, 0)
    main()
