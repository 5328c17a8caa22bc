"""What can go wrong, what is done about it, and who is charged for it. Pure: no torch, no Ray, no clock.

`fault_of` judges what one image did inside a worker, `loss_of` how a worker was lost, `POLICY` says what follows. Texts
are those of CUDA's runtime (cudaGetErrorString), cuBLAS, cuDNN and Ray 2.60; `errors` has those for want of memory.
"""

import re
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from tinysd_batch.errors import StorageError, TinySDError, is_out_of_memory
from tinysd_batch.storage.atomic import is_transient


class Fault(StrEnum):
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


class Action(Enum):
    SAVE_MEMORY = auto()  # go down the ladder of `job.savings`, remember how far, try again
    FAIL = auto()  # its images are tried one by one; one that fails alone is a row `failed`
    WAIT = auto()  # try again after growing delays (`storage.patiently`); after the last one, STOP
    STOP = auto()  # the job ends, whole and resumable
    SUSPECT = auto()  # a new process; the images of the batch travel alone, the third loss quarantines one
    FEWER = auto()  # a new process only where others remain on that machine; the images go to anybody
    REQUEUE = auto()  # the images go to anybody


class Charged(Enum):
    NOBODY = auto()
    IMAGE = auto()
    NODE = auto()


@dataclass(frozen=True, slots=True)
class Policy:
    action: Action
    charged: Charged


POLICY = {
    Fault.OUT_OF_MEMORY: Policy(Action.SAVE_MEMORY, Charged.NOBODY),  # a larger card may hold it: see `job.dispatch`
    Fault.NOT_FINITE: Policy(Action.FAIL, Charged.IMAGE),  # the model has tried float32 by itself
    Fault.REFUSED: Policy(Action.FAIL, Charged.IMAGE),
    Fault.ERROR: Policy(Action.FAIL, Charged.IMAGE),
    Fault.TRANSIENT_IO: Policy(Action.WAIT, Charged.NOBODY),
    Fault.STORAGE: Policy(Action.STOP, Charged.NOBODY),
    Fault.DEVICE_BROKEN: Policy(Action.SUSPECT, Charged.IMAGE),  # the worker's process ends itself
    Fault.WORKER_DIED: Policy(Action.SUSPECT, Charged.IMAGE),
    Fault.HUNG: Policy(Action.SUSPECT, Charged.IMAGE),  # no answer by the deadline: see `scheduler.Patience`
    Fault.HOST_OUT_OF_MEMORY: Policy(Action.FEWER, Charged.NODE),
    Fault.NODE_LOST: Policy(Action.REQUEUE, Charged.NOBODY),
}

BROKEN_DEVICE = re.compile(
    r"device-side assert|illegal memory access|illegal instruction|illegal address|misaligned address|"
    r"unspecified launch failure|launch timed out|uncorrectable (?:ecc|nvlink)|hardware stack error|"
    r"invalid program counter|CU\w+_STATUS_(?:EXECUTION_FAILED|MAPPING_ERROR|INTERNAL_ERROR)|"
    r"no CUDA-capable device|GPU is lost|fallen off the bus|CUDA error: unknown error",
    re.I,
)
DEVICE_ERRORS = ("AcceleratorError",)  # torch's, for whatever CUDA reports besides a lack of memory
NODE_ERRORS = ("NodeDiedError", "ActorUnavailableError", "LocalRayletDiedError")  # the second: it cannot be reached
NODE_DEATH = re.compile(r"node has died|node died|node was (?:terminated|preempted)|node.{0,80}\bmarked dead\b", re.I)


def fault_of(error: BaseException) -> Fault:
    """What an exception that came up while images were made means."""
    if isinstance(error, StorageError):
        return Fault.TRANSIENT_IO if is_transient(error) else Fault.STORAGE
    if isinstance(error, TinySDError):
        return Fault.NOT_FINITE if type(error).__name__ == "NotFiniteError" else Fault.REFUSED
    if is_out_of_memory(error):
        return Fault.OUT_OF_MEMORY
    if type(error).__name__ in DEVICE_ERRORS or BROKEN_DEVICE.search(str(error)):
        return Fault.DEVICE_BROKEN
    return Fault.ERROR


def loss_of(error: BaseException, node_is_dead: bool = False) -> Fault:
    """What the exception by which Ray tells of a lost worker means."""
    name = type(error).__name__
    if name == "OutOfMemoryError":  # the memory monitor's kill; a kill by the kernel looks as any other death
        return Fault.HOST_OUT_OF_MEMORY
    if node_is_dead or name in NODE_ERRORS or getattr(error, "preempted", False) or NODE_DEATH.search(str(error)):
        return Fault.NODE_LOST
    return Fault.WORKER_DIED


def error_class(error: BaseException) -> str:
    """A failure's class as the results table names it."""
    fault = fault_of(error)
    return type(error).__name__ if fault is Fault.ERROR else str(fault)
