"""Make malloc return freed memory to the operating system."""

import contextlib
import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MMAP_THRESHOLD_VARIABLE = "MALLOC_MMAP_THRESHOLD_"  # the environment variable that sets the same


def trim_heap() -> None:
    """Return free memory at the top of glibc's heap to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def set_mmap_threshold(nbytes: int) -> None:
    """Have glibc allocate blocks of at least so many bytes with mmap, so that freeing them returns them at once.

    Smaller blocks come from the heap, which rarely shrinks, but mmap costs time for fresh pages. Applies to the whole
    process. A threshold that the user set in the environment wins.
    """
    if MMAP_THRESHOLD_VARIABLE not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, nbytes)
            libc.mallopt(M_TRIM_THRESHOLD, 16 * nbytes)
