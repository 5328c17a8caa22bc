"""What can go wrong, what is done about it, and what it counts against. Pure logic: no torch, no Ray, no clock.

`classify_error` classifies an exception inside a worker, `classify_worker_loss` the loss of a worker, and
`FAULT_POLICIES` says what follows. The patterns match messages of the CUDA runtime (cudaGetErrorString), cuBLAS, cuDNN
and Ray 2.60; those for out-of-memory are in `errors`.
"""

import re
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from tinysd_batch.errors import StorageError, TinySDError, is_out_of_memory
from tinysd_batch.storage.filesystem import is_transient


class FaultType(StrEnum):
    """What went wrong. It is the `error_class` in the results table; for ERROR that is the exception's type instead."""

    # An image failed in its worker.
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    REFUSED = "refused"
    ERROR = "error"
    # The storage failed.
    TRANSIENT_IO = "transient_io"
    STORAGE = "storage"
    # A worker was lost while it generated images.
    DEVICE_BROKEN = "device_broken"
    WORKER_DIED = "worker_died"
    HUNG = "hung"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    NODE_LOST = "node_lost"


class FaultAction(Enum):
    USE_LESS_MEMORY = auto()  # apply the next OOM fallback, remember it, and try again
    FAIL = auto()  # try the images of the batch one by one; one that fails alone gets a row `failed`
    RETRY_WITH_BACKOFF = auto()  # the storage layer has retried with growing delays; then as STOP_JOB
    STOP_JOB = auto()  # end the run; the job can be resumed
    SUSPECT = auto()  # start a new process and try the images of the batch one by one; three losses quarantine one
    REDUCE_WORKERS = auto()  # start no new process unless it was the machine's last worker; requeue the images
    REQUEUE = auto()  # requeue the images for any worker


class CountsAgainst(Enum):
    NOTHING = auto()
    IMAGE = auto()
    NODE = auto()


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    action: FaultAction
    counts_against: CountsAgainst


FAULT_POLICIES = {
    # The dispatcher then tries workers with more memory.
    FaultType.OUT_OF_MEMORY: FaultPolicy(FaultAction.USE_LESS_MEMORY, CountsAgainst.NOTHING),
    # The model has tried float32 before it raises this.
    FaultType.NOT_FINITE: FaultPolicy(FaultAction.FAIL, CountsAgainst.IMAGE),
    FaultType.REFUSED: FaultPolicy(FaultAction.FAIL, CountsAgainst.IMAGE),
    FaultType.ERROR: FaultPolicy(FaultAction.FAIL, CountsAgainst.IMAGE),
    FaultType.TRANSIENT_IO: FaultPolicy(FaultAction.RETRY_WITH_BACKOFF, CountsAgainst.NOTHING),
    FaultType.STORAGE: FaultPolicy(FaultAction.STOP_JOB, CountsAgainst.NOTHING),
    # The worker's process ends itself.
    FaultType.DEVICE_BROKEN: FaultPolicy(FaultAction.SUSPECT, CountsAgainst.IMAGE),
    FaultType.WORKER_DIED: FaultPolicy(FaultAction.SUSPECT, CountsAgainst.IMAGE),
    # No result within `chunk_size.HangTimeout`.
    FaultType.HUNG: FaultPolicy(FaultAction.SUSPECT, CountsAgainst.IMAGE),
    FaultType.HOST_OUT_OF_MEMORY: FaultPolicy(FaultAction.REDUCE_WORKERS, CountsAgainst.NODE),
    FaultType.NODE_LOST: FaultPolicy(FaultAction.REQUEUE, CountsAgainst.NOTHING),
}

BROKEN_DEVICE_PATTERN = re.compile(
    r"device-side assert|illegal memory access|illegal instruction|illegal address|misaligned address|"
    r"unspecified launch failure|launch timed out|uncorrectable (?:ecc|nvlink)|hardware stack error|"
    r"invalid program counter|CU\w+_STATUS_(?:EXECUTION_FAILED|MAPPING_ERROR|INTERNAL_ERROR)|"
    r"no CUDA-capable device|GPU is lost|fallen off the bus|CUDA error: unknown error",
    re.I,
)
DEVICE_ERROR_TYPES = ("AcceleratorError",)  # torch's, for all that CUDA reports except out-of-memory
NODE_ERROR_TYPES = ("NodeDiedError", "ActorUnavailableError", "LocalRayletDiedError")  # the second: not reachable
NODE_DEATH_PATTERN = re.compile(
    r"node has died|node died|node was (?:terminated|preempted)|node.{0,80}\bmarked dead\b", re.I
)


def classify_error(error: BaseException) -> FaultType:
    """Classify an exception that was raised while images were generated or published."""
    if isinstance(error, StorageError):
        return FaultType.TRANSIENT_IO if is_transient(error) else FaultType.STORAGE
    if isinstance(error, TinySDError):
        return FaultType.NOT_FINITE if type(error).__name__ == "NotFiniteError" else FaultType.REFUSED
    if is_out_of_memory(error):
        return FaultType.OUT_OF_MEMORY
    if type(error).__name__ in DEVICE_ERROR_TYPES or BROKEN_DEVICE_PATTERN.search(str(error)):
        return FaultType.DEVICE_BROKEN
    return FaultType.ERROR


def classify_worker_loss(error: BaseException, node_is_dead: bool = False) -> FaultType:
    """Classify the exception with which Ray reports a lost worker."""
    name = type(error).__name__
    if name == "OutOfMemoryError":  # killed by Ray's memory monitor; a kill by the kernel looks like any other death
        return FaultType.HOST_OUT_OF_MEMORY
    if (
        node_is_dead
        or name in NODE_ERROR_TYPES
        or getattr(error, "preempted", False)
        or NODE_DEATH_PATTERN.search(str(error))
    ):
        return FaultType.NODE_LOST
    return FaultType.WORKER_DIED


def get_error_class(error: BaseException) -> str:
    """Return the `error_class` of a failure in the results table."""
    fault = classify_error(error)
    return type(error).__name__ if fault is FaultType.ERROR else str(fault)
