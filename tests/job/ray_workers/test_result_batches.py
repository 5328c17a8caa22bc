"""Which results travel together, and that none comes late, out of order or not at all."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.planning import common, row
from tinysd_batch.job.plan.batches import cut_batches, plan_images
from tinysd_batch.job.ray_workers.result_batches import MAX_DELAY_S, MicroBatchResults, group_results
from tinysd_batch.records import ImageResult, MicroBatch, Status


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def batches_of(count: int) -> list[MicroBatch]:
    return list(cut_batches(plan_images([row(number, None, 1, 1) for number in range(1, count + 1)], common(5)), ()))


def draw(clock: Clock, seconds: list[float], statuses: list[Status]) -> Iterator[list[ImageResult]]:
    for index, (took, status) in enumerate(zip(seconds, statuses, strict=True), start=1):
        clock.now += took
        yield [ImageResult(index, status, file_name="f" if status is Status.OK else None, finished_at=clock.now)]


def indexes(parcel: list[MicroBatchResults]) -> list[int]:
    return [result.index for made in parcel for result in made.results]


STEPS = st.lists(st.tuples(st.floats(0.001, 3), st.sampled_from([Status.OK, Status.OK, Status.FAILED])), max_size=30)


@given(STEPS)
def test_every_result_once_in_order_and_failures_at_once(steps: list[tuple[float, Status]]) -> None:
    clock = Clock()
    seconds, statuses = [took for took, _ in steps], [status for _, status in steps]
    parcels = list(group_results(batches_of(len(steps)), draw(clock, seconds, statuses), clock=clock))
    assert [index for parcel in parcels for index in indexes(parcel)] == list(range(1, len(steps) + 1))
    assert all(statuses[index - 1] is Status.OK for parcel in parcels for index in indexes(parcel)[:-1])
    assert [made.seconds for parcel in parcels for made in parcel] == pytest.approx(seconds)


@pytest.mark.parametrize(("each_s", "together"), [(0.05, 11), (0.2, 3), (0.6, 1), (5.0, 1)])
def test_quick_results_travel_together_and_slow_ones_alone(each_s: float, together: int) -> None:
    clock = Clock()
    parcels = group_results(batches_of(40), draw(clock, [each_s] * 40, [Status.OK] * 40), clock=clock)
    sent = [(len(parcel), clock.now - (parcel[0].results[0].finished_at or 0.0)) for parcel in parcels]
    assert max(size for size, _ in sent) == together
    assert max(late for _, late in sent) <= MAX_DELAY_S


def test_a_slow_batch_holds_up_no_result_before_it() -> None:
    clock = Clock()
    batches = cut_batches(plan_images([row(1, None, 1, 1), row(2, None, 1, 16)], common(5)), ())
    parcels = group_results(list(batches), draw(clock, [0.1, 1.6], [Status.OK] * 2), clock=clock)
    assert indexes(next(parcels)) == [1]
    assert clock.now == pytest.approx(0.1)


def test_what_was_made_before_an_error_is_told() -> None:
    def breaks() -> Iterator[list[ImageResult]]:
        yield from draw(Clock(), [0.01] * 3, [Status.OK] * 3)
        raise RuntimeError("broken")

    parcels = group_results(batches_of(5), breaks(), clock=Clock())
    assert indexes(next(parcels)) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="broken"):
        next(parcels)


def test_nothing_waits_where_pictures_do_not_say_how_they_were_made() -> None:
    clock = Clock()
    made = draw(clock, [0.01] * 5, [Status.OK] * 5)
    assert [len(parcel) for parcel in group_results(batches_of(5), made, 0.0, clock)] == [1] * 5
