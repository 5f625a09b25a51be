"""Memory of a process that trains on a CPU: its size, and what the C library does with freed memory."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

GROWTH = 1.1  # a process may hold so many times what its steps need


def resident_bytes(process: int | str = "self") -> int:
    """Bytes of memory that a process holds now; 0 if it has ended, or where there is no /proc."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class FreedMemory:
    """Freed memory stays in the process for the next step, until the process has grown by a tenth.

    glibc returns large blocks at once, and new pages take a fifth of a step (docs/log/experiments.md). Blocks
    that are kept become fragmented, so all free pages are returned from time to time. Nothing is done for
    other devices, or with another C library.
    """

    def __init__(self, device: torch.device) -> None:
        self.limit = 0.0  # bytes; beyond them free pages are returned
        self.returned = False  # after the last step
        self.libc = _glibc() if device.type == "cpu" else None
        if self.libc is not None:
            # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            for option, value in ((-4, 0), (-1, -1), (-2, 1 << 26)):
                self.libc.mallopt(option, value)

    def after_step(self) -> None:
        """Return all free pages to the system if the process has grown."""
        if self.libc is None:
            return
        size = resident_bytes()
        if self.returned:  # all pages that are held now were needed
            self.limit, self.returned = max(self.limit, GROWTH * size), False
        elif size > self.limit:
            self.libc.malloc_trim(0)
            self.returned = True


def _glibc() -> ctypes.CDLL | None:
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim.argtypes = (ctypes.c_size_t,)
        if libc.mallopt and libc.gnu_get_libc_version:
            return libc
    return None
