# SPDX-License-Identifier: GPL-2.0-or-later
"""Punching holes into files, which Python's os has no call for."""

from __future__ import annotations

import ctypes
import os
from typing import Final

_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def punch(fd: int, offset: int, length: int) -> None:
    """Free a range of bytes, which reads as zeros then.  Raises OSError."""
    if _fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
