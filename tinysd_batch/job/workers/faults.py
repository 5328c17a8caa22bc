"""What can go wrong, what is done about it, and who is charged for it. Pure: no torch, no Ray, no clock.

`fault_of` judges what one image did inside a worker, `loss_of` how a worker was lost, `POLICY` says what follows. Texts
are those of CUDA's runtime (cudaGetErrorString), cuBLAS, cuDNN and Ray 2.60; `errors` has those for want of memory.
"""

import re
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from tinysd_batch.errors import StorageError, TinySDError, is_out_of_memory
from tinysd_batch.storage.atomic import is_transient


class FaultType(StrEnum):
    """A kind of failure. In the results table `error_class` bears its name, or the exception's type for ERROR."""

    # Of an image, found by its worker.
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    REFUSED = "refused"
    ERROR = "error"
    # Of the storage.
    TRANSIENT_IO = "transient_io"
    STORAGE = "storage"
    # Of a worker, with the images it was at.
    DEVICE_BROKEN = "device_broken"
    WORKER_DIED = "worker_died"
    HUNG = "hung"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    NODE_LOST = "node_lost"


class FaultAction(Enum):
    USE_LESS_MEMORY = auto()  # go down the ladder of `job.savings`, remember how far, try again
    FAIL = auto()  # its images are tried one by one; one that fails alone is a row `failed`
    RETRY_WITH_BACKOFF = auto()  # try again after growing delays (`storage.patiently`); after the last one, STOP
    STOP_JOB = auto()  # the job ends, whole and resumable
    SUSPECT = auto()  # a new process; the images of the batch travel alone, the third loss quarantines one
    REDUCE_WORKERS = auto()  # a new process only where others remain on that machine; the images go to anybody
    REQUEUE = auto()  # the images go to anybody


class CountsAgainst(Enum):
    NOTHING = auto()
    IMAGE = auto()
    NODE = auto()


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    action: FaultAction
    counts_against: CountsAgainst


FAULT_POLICIES = {
    FaultType.OUT_OF_MEMORY: FaultPolicy(
        FaultAction.USE_LESS_MEMORY, CountsAgainst.NOTHING
    ),  # a larger card may hold it: see `job.dispatch`
    FaultType.NOT_FINITE: FaultPolicy(FaultAction.FAIL, CountsAgainst.IMAGE),  # the model has tried float32 by itself
    FaultType.REFUSED: FaultPolicy(FaultAction.FAIL, CountsAgainst.IMAGE),
    FaultType.ERROR: FaultPolicy(FaultAction.FAIL, CountsAgainst.IMAGE),
    FaultType.TRANSIENT_IO: FaultPolicy(FaultAction.RETRY_WITH_BACKOFF, CountsAgainst.NOTHING),
    FaultType.STORAGE: FaultPolicy(FaultAction.STOP_JOB, CountsAgainst.NOTHING),
    FaultType.DEVICE_BROKEN: FaultPolicy(FaultAction.SUSPECT, CountsAgainst.IMAGE),  # the worker's process ends itself
    FaultType.WORKER_DIED: FaultPolicy(FaultAction.SUSPECT, CountsAgainst.IMAGE),
    FaultType.HUNG: FaultPolicy(
        FaultAction.SUSPECT, CountsAgainst.IMAGE
    ),  # no answer by the deadline: see `scheduler.Patience`
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
DEVICE_ERROR_TYPES = ("AcceleratorError",)  # torch's, for whatever CUDA reports besides a lack of memory
NODE_ERROR_TYPES = (
    "NodeDiedError",
    "ActorUnavailableError",
    "LocalRayletDiedError",
)  # the second: it cannot be reached
NODE_DEATH_PATTERN = re.compile(
    r"node has died|node died|node was (?:terminated|preempted)|node.{0,80}\bmarked dead\b", re.I
)


def classify_error(error: BaseException) -> FaultType:
    """What an exception that came up while images were made means."""
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
    """What the exception by which Ray tells of a lost worker means."""
    name = type(error).__name__
    if name == "OutOfMemoryError":  # the memory monitor's kill; a kill by the kernel looks as any other death
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
    """A failure's class as the results table names it."""
    fault = classify_error(error)
    return type(error).__name__ if fault is FaultType.ERROR else str(fault)
