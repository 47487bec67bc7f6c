#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""extract-vmlinux.py BZIMAGE VMLINUX: the ELF kernel inside an LZ4 bzImage.

QEMU boots it by its PVH entry, which spares an emulated machine the BIOS and
the decompression.  Knows LZ4 alone, which Debian's cloud kernels use.
"""

import struct
import subprocess
import sys
from pathlib import Path

# Documentation/arch/x86/boot.rst: offsets in the setup header.
SETUP_SECTS = 0x1F1
PAYLOAD_OFFSET = 0x248
LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"


def main() -> None:
    """Extract and check; exits with a message when the image is not as expected."""
    source, target = map(Path, sys.argv[1:3])
    image = source.read_bytes()
    sectors = image[SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if not payload.startswith(LZ4_LEGACY_MAGIC):
        sys.exit(f"{source}: the kernel in it is not packed with LZ4")
    # The last four bytes are the unpacked size.
    (size,) = struct.unpack("<I", payload[-4:])
    done = subprocess.run(["lz4", "-dc"], input=payload[:-4], capture_output=True, check=False)
    if len(done.stdout) != size or not done.stdout.startswith(b"\x7fELF"):
        sys.exit(f"{source}: lz4 gave {len(done.stdout)} bytes, not an ELF file of {size}")
    target.write_bytes(done.stdout)


if __name__ == "__main__":
    main()
