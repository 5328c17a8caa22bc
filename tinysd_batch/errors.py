"""Every error a user can cause or meet, each with the exit code it ends in.

A message says what is wrong, where (file, row, column, tensor), and what to do.
"""

import re

# Texts of CUDA's runtime (cudaGetErrorString), cuBLAS, cuDNN and torch's allocators.
OUT_OF_MEMORY_PATTERN = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|CU\w+_STATUS_ALLOC_FAILED|"
    # how cuDNN and cuBLAS come to say that there is no memory for what they would like
    r"unable to find an engine to execute|CU\w+_STATUS_NOT_INITIALIZED",
    re.I,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, of Python's or of a library's, says that memory did not suffice."""
    is_so_by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_so_by_type or OUT_OF_MEMORY_PATTERN.search(str(error)) is not None


class TinySDError(Exception):
    """Anything expected to go wrong; the command line prints its message and exits with its code."""

    exit_code = 1


class UsageError(TinySDError):
    """A setting, option or file that cannot be used as given."""

    exit_code = 2


class ManifestError(UsageError):
    """The manifest as a whole cannot be read."""


class ModelError(UsageError):
    """A model folder or checkpoint that cannot be used."""


class JobMismatchError(UsageError):
    """The job folder holds another job, or the same one with other settings."""


class JobLockedError(TinySDError):
    """Another driver is working in the job folder."""

    exit_code = 4


class StorageError(TinySDError):
    """The disk is full or cannot be written."""

    exit_code = 5


class NoWorkerError(TinySDError):
    """No worker could be started, or none is left."""

    exit_code = 6


class BrokenWorkerError(NoWorkerError):
    """A worker's process can draw no more, since its device's context is broken; a new process may."""


class NotFiniteError(TinySDError):
    """An image came out as NaN, infinite or one flat colour."""


class OccupiedPathError(TinySDError):
    """A folder is where an image's file should be."""
