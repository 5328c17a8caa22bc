"""Which results are sent together, and that none is late, out of order or missing."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.planning import make_row, make_shared_settings
from tinysd_batch.job.plan.batches import cut_batches, plan_images
from tinysd_batch.job.ray_workers.result_batches import MAX_DELAY_S, MicroBatchResults, group_results
from tinysd_batch.records import ImageResult, MicroBatch, Status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_batches(count: int) -> list[MicroBatch]:
    return list(
        cut_batches(
            plan_images([make_row(number, None, 1, 1) for number in range(1, count + 1)], make_shared_settings(5)), ()
        )
    )


def generate(clock: Clock, seconds: list[float], statuses: list[Status]) -> Iterator[list[ImageResult]]:
    for index, (duration_s, status) in enumerate(zip(seconds, statuses, strict=True), start=1):
        clock.now += duration_s
        yield [ImageResult(index, status, file_name="f" if status is Status.OK else None, finished_at=clock.now)]


def get_indexes(group: list[MicroBatchResults]) -> list[int]:
    return [result.index for batch in group for result in batch.results]


STEPS = st.lists(st.tuples(st.floats(0.001, 3), st.sampled_from([Status.OK, Status.OK, Status.FAILED])), max_size=30)


@given(STEPS)
def test_every_result_is_sent_once_in_order_and_failures_at_once(steps: list[tuple[float, Status]]) -> None:
    clock = Clock()
    seconds, statuses = [duration_s for duration_s, _ in steps], [status for _, status in steps]
    groups = list(group_results(make_batches(len(steps)), generate(clock, seconds, statuses), clock=clock))
    assert [index for group in groups for index in get_indexes(group)] == list(range(1, len(steps) + 1))
    assert all(statuses[index - 1] is Status.OK for group in groups for index in get_indexes(group)[:-1])
    assert [batch.seconds for group in groups for batch in group] == pytest.approx(seconds)


@pytest.mark.parametrize(("image_s", "largest_group"), [(0.05, 11), (0.2, 3), (0.6, 1), (5.0, 1)])
def test_quick_results_are_sent_together_and_slow_ones_alone(image_s: float, largest_group: int) -> None:
    clock = Clock()
    groups = group_results(make_batches(40), generate(clock, [image_s] * 40, [Status.OK] * 40), clock=clock)
    sent = [(len(group), clock.now - (group[0].results[0].finished_at or 0.0)) for group in groups]
    assert max(size for size, _ in sent) == largest_group
    assert max(delay_s for _, delay_s in sent) <= MAX_DELAY_S


def test_a_slow_batch_does_not_delay_earlier_results() -> None:
    clock = Clock()
    batches = cut_batches(plan_images([make_row(1, None, 1, 1), make_row(2, None, 1, 16)], make_shared_settings(5)), ())
    groups = group_results(list(batches), generate(clock, [0.1, 1.6], [Status.OK] * 2), clock=clock)
    assert get_indexes(next(groups)) == [1]
    assert clock.now == pytest.approx(0.1)


def test_results_before_an_error_are_sent() -> None:
    def generate_and_break() -> Iterator[list[ImageResult]]:
        yield from generate(Clock(), [0.01] * 3, [Status.OK] * 3)
        raise RuntimeError("broken")

    groups = group_results(make_batches(5), generate_and_break(), clock=Clock())
    assert get_indexes(next(groups)) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="broken"):
        next(groups)


def test_without_metadata_in_images_every_result_is_sent_at_once() -> None:
    clock = Clock()
    results = generate(clock, [0.01] * 5, [Status.OK] * 5)
    assert [len(group) for group in group_results(make_batches(5), results, 0.0, clock)] == [1] * 5
