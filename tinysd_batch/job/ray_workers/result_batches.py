"""Send the results of quick micro-batches together, because each message costs driver and worker 1 to 2 ms.

Only results that the driver could find by itself may be delayed: images on disk whose metadata says how they were
generated. When a worker is lost, the driver adopts what it had finished and not reported, and so still knows which
micro-batch it was generating. Pure logic, no I/O.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.job.workers.oom_fallback import ImageShape, MemoryLimits
from tinysd_batch.records import ImageResult, MicroBatch, Status

MAX_DELAY_S = 0.5  # of a result


@dataclass(frozen=True, slots=True)
class MicroBatchResults:
    """The results of a micro-batch's wanted images, and the time that it took."""

    results: list[ImageResult]
    seconds: float


@dataclass(frozen=True, slots=True)
class ResultBatch:
    """One message from a worker to the driver."""

    micro_batches: list[MicroBatchResults]
    memory_limits: dict[ImageShape, MemoryLimits]  # learnt so far; the slot's next actor starts with them


def group_results(
    batches: Sequence[MicroBatch],
    results: Iterable[list[ImageResult]],
    max_delay_s: float = MAX_DELAY_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[MicroBatchResults]]:
    """Group the results of micro-batches so that none waits longer than `max_delay_s`.

    Whether the next batch will be done in time is estimated from the duration of the latest. When `results` raises, the
    results before the error are yielded first.

    Args:
        batches: the micro-batches of a chunk.
        results: yields the results of each when it is done.
        max_delay_s: 0 sends each micro-batch at once.
        clock: returns seconds.
    """
    group: list[MicroBatchResults] = []
    started_at = send_by = clock()
    try:
        for number, batch_results in enumerate(results):
            now = clock()
            send_by = send_by if group else now + max_delay_s
            group.append(MicroBatchResults(batch_results, now - started_at))
            following = batches[number + 1 : number + 2]
            relative_cost = sum(map(estimate_batch_cost, following)) / estimate_batch_cost(batches[number])
            expected_s = (now - started_at) * relative_cost
            started_at = now
            if not following or now + expected_s > send_by or not all(map(can_be_adopted, batch_results)):
                yield group
                group, started_at = [], clock()
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def can_be_adopted(result: ImageResult) -> bool:
    return result.status is Status.OK and result.file_name is not None
