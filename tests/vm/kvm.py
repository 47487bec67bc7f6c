# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds out whether /dev/kvm really runs code.

A node that opens proves nothing: there are hosts where it opens and the first
vCPU spins, or QEMU stops with an assertion.  So something tiny is booted: a
boot sector that leaves by the debug exit device.  The answer is kept until the
host boots again.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# 16 bit code: jump through 32 bit mode is not needed to see that a vCPU runs;
# mov al, 0x21; out 0xf4, al; hlt.  QEMU then exits with (0x21 << 1) | 1.
_CODE = bytes([0xB0, 0x21, 0xE6, 0xF4, 0xF4])
_EXIT = 0x21 << 1 | 1
_SECONDS = 10.0


def _boot() -> bool:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    sector = _CODE.ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(suffix=".img") as image:
        image.write(sector)
        image.flush()
        argv = [qemu, "-accel", "kvm", "-cpu", "host", "-m", "32M", "-nodefaults"]
        argv += ["-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        argv += ["-drive", f"file={image.name},format=raw,if=ide,readonly=on"]
        try:
            done = subprocess.run(
                argv,
                timeout=_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == _EXIT


def really_works(build: Path) -> bool:
    """Return whether KVM boots something here; asked once per boot of the host."""
    if not Path("/dev/kvm").exists():
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    cache = build / "stamps" / f"kvm-{boot_id}"
    if cache.exists():
        return cache.read_text() == "yes"
    answer = _boot()
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("yes" if answer else "no")
    return answer
