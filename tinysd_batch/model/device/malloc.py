"""Make malloc return freed memory to the operating system."""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt

MMAP_THRESHOLD_VARIABLE = "MALLOC_MMAP_THRESHOLD_"  # and what it is called in the environment


def trim_heap() -> None:
    """Hand the system what this phase has freed, which glibc would keep for itself."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def set_mmap_threshold(nbytes: int) -> None:
    """Have glibc give blocks of the system's own for tensors of so many bytes, which go back as soon as they are free.

    Otherwise its heap keeps what it once had; but fetching pages anew costs time. Holds for the whole process.
    """
    if MMAP_THRESHOLD_VARIABLE not in os.environ:  # the user's word
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, nbytes)
            libc.mallopt(M_TRIM_THRESHOLD, 16 * nbytes)
