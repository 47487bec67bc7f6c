# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles tests/driver/progs.  `python -m tests.driver.build` on the host spares an emulated
machine the compiler; whatever is not there yet is made when a test wants it.

A program is kept in build/progs under the hash of its source and of the uapi header, so that a
stale one is never run.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "progs"
UAPI = ROOT / "kmod/include/uapi"
BUILD = Path(os.environ.get("UMEM_BUILD", ROOT / "build")) / "progs"
# Static: hundreds of short-lived processes start faster without a loader.
GCC = ("gcc", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{UAPI}")


def build(name: str) -> Path:
    """Return progs/NAME.c compiled.  Raises CalledProcessError."""
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256()
    for path in (source, UAPI / "linux/umem.h", Path(__file__)):
        digest.update(path.read_bytes())
    binary = BUILD / f"{name}-{digest.hexdigest()[:16]}"
    if not binary.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: another machine may do the same just now.
        unfinished = binary.with_suffix(f".{os.getpid()}")
        subprocess.run([*GCC, str(source), "-o", str(unfinished)], check=True)
        unfinished.rename(binary)
    return binary


@functools.cache
def program(name: str) -> Path:
    """Return progs/NAME.c compiled, on a local file system where any user may run it.

    The checkout of the test machine comes from its host, and is slow to start programs from.
    """
    folder = Path(tempfile.gettempdir()) / f"umem-progs.{os.getpid()}"
    folder.mkdir(mode=0o755, exist_ok=True)
    folder.chmod(0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(shutil.copy(build(name), folder / name))


if __name__ == "__main__":
    for path in sorted(SOURCES.glob("*.c")):
        build(path.stem)
