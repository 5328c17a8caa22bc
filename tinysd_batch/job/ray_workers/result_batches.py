"""Results of quick micro-batches travel together: each message costs driver and worker a millisecond or two. Pure.

Only what the driver could find out by itself may wait: pictures that are on disk and say how they were made. So when a
worker is lost, what it had finished and not told of is adopted, and the micro-batch it was at is known as before.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.job.workers.oom_fallback import ImageShape, MemoryLimits
from tinysd_batch.records import ImageResult, MicroBatch, Status

MAX_DELAY_S = 0.5  # for which a result may wait


@dataclass(frozen=True, slots=True)
class MicroBatchResults:
    """What became of a micro-batch's wanted images, and how long that took."""

    results: list[ImageResult]
    seconds: float


@dataclass(frozen=True, slots=True)
class ResultBatch:
    """What travels from a worker to the driver."""

    micro_batches: list[MicroBatchResults]
    memory_limits: dict[
        ImageShape, MemoryLimits
    ]  # what its card cannot hold, as learnt so far: for the process that may follow it


def group_results(
    batches: Sequence[MicroBatch], made: Iterable[list[ImageResult]], late_s: float = MAX_DELAY_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[MicroBatchResults]]:  # fmt: skip
    """Each batch's results once they are there, with those that came less than `late_s` before.

    Whether the next batch is done in time is judged by how long this one took. An error comes after what was made
    before it.
    """
    parcel: list[MicroBatchResults] = []
    began = leave_by = clock()
    try:
        for number, results in enumerate(made):
            now = clock()
            leave_by = leave_by if parcel else now + late_s
            parcel.append(MicroBatchResults(results, now - began))
            following = batches[number + 1 : number + 2]
            expected = (now - began) * sum(map(estimate_batch_cost, following)) / estimate_batch_cost(batches[number])
            began = now
            if not following or now + expected > leave_by or not all(map(can_be_adopted, results)):
                yield parcel
                parcel, began = [], clock()
    except Exception:
        if parcel:
            yield parcel
        raise
    if parcel:
        yield parcel


def can_be_adopted(result: ImageResult) -> bool:
    return result.status is Status.OK and result.file_name is not None
