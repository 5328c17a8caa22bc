"""All errors that users can cause or encounter, each with its exit code.

A message states where the error is (file, row, column, tensor), what is wrong, and what to do.
"""

import re

# Messages of CUDA's runtime (cudaGetErrorString), cuBLAS, cuDNN and torch's allocators.
OUT_OF_MEMORY_PATTERN = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|CU\w+_STATUS_ALLOC_FAILED|"
    # how cuDNN and cuBLAS report that they cannot allocate their workspace
    r"unable to find an engine to execute|CU\w+_STATUS_NOT_INITIALIZED",
    re.I,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or a library means that memory was exhausted."""
    has_memory_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return has_memory_type or OUT_OF_MEMORY_PATTERN.search(str(error)) is not None


class TinySDError(Exception):
    """Base class of expected errors; the command line prints the message and exits with the code."""

    exit_code = 1


class UsageError(TinySDError):
    """A setting, option or file cannot be used as given."""

    exit_code = 2


class ManifestError(UsageError):
    """The manifest as a whole cannot be read."""


class ModelError(UsageError):
    """A model folder or checkpoint cannot be used."""


class JobMismatchError(UsageError):
    """The job folder contains another job, or the same job with other settings."""


class JobLockedError(TinySDError):
    """Another driver process uses the job folder."""

    exit_code = 4


class StorageError(TinySDError):
    """The disk is full or cannot be written."""

    exit_code = 5


class NoWorkerError(TinySDError):
    """No worker could be started, or all are lost."""

    exit_code = 6


class BrokenWorkerError(NoWorkerError):
    """The device context of a worker process is broken; only a new process can generate images."""


class NotFiniteError(TinySDError):
    """A generated image is NaN, infinite or a single flat colour."""


class OccupiedPathError(TinySDError):
    """A folder exists at the path of an image file."""
