"""Images are planned in manifest order, and cut into micro-batches that do not depend on interruptions."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.support.planning import SETTINGS, make_row, make_shared_settings, plan_requests
from tinysd_batch.job.plan.batches import (
    count_batches,
    cut_batches,
    format_file_name,
    plan_images,
    split_into_single_images,
)
from tinysd_batch.records import InvalidRow, Row

SPECS = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 9)), st.integers(1, 4), st.integers(1, 4)), max_size=8)


@given(SPECS, st.sets(st.integers(1, 40)))
def test_batches_hold_every_unfinished_image_once_in_order(
    specs: list[tuple[int | None, int, int]], finished: set[int]
) -> None:
    rows: list[Row | InvalidRow] = [make_row(number, *spec) for number, spec in enumerate(specs, start=1)]
    planned = list(plan_images(rows, make_shared_settings(5)))
    total = sum(len(images) for _, images in planned)
    batches = list(cut_batches(planned, finished))
    wanted = [index for batch in batches for index in sorted(batch.wanted)]
    assert wanted == [index for index in range(1, total + 1) if index not in finished]
    assert [single.images[0].index for single in split_into_single_images(batches)] == wanted
    for batch in batches:
        assert len(batch.images) <= rows[batch.images[0].row - 1].n_samples  # type: ignore[union-attr]


@given(SPECS, st.sets(st.integers(1, 40)))
def test_finished_images_do_not_change_the_composition_of_batches(
    specs: list[tuple[int | None, int, int]], finished: set[int]
) -> None:
    rows: list[Row | InvalidRow] = [make_row(number, *spec) for number, spec in enumerate(specs, start=1)]
    planned = list(plan_images(rows, make_shared_settings(5)))
    whole = [batch.images for batch in cut_batches(planned, ())]
    assert all(batch.images in whole for batch in cut_batches(planned, finished))


def test_seeds_and_indexes() -> None:
    images = plan_requests([make_row(1, 7, 2, 2), InvalidRow(2, "bad"), make_row(3, None, 1, 2)])
    assert [(image.index, image.row, image.sample, image.seed) for image in images] == [
        (1, 1, 1, 7), (2, 1, 2, 8), (3, 1, 3, 9), (4, 1, 4, 10), (5, 3, 1, 104), (6, 3, 2, 105),
    ]  # fmt: skip


def test_the_seed_of_the_job_wraps_around() -> None:
    assert [image.seed for image in plan_requests([make_row(1, None, 3, 1)], job_seed=2**63 - 2)] == [
        2**63 - 2,
        2**63 - 1,
        0,
    ]


MIXED = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1.0, 2.0, 7.5]), st.sampled_from([20, 50])),
    max_size=8,
)


@given(MIXED, st.sets(st.integers(1, 40)), st.integers(1, 6))
def test_batches_of_several_rows_are_as_large_as_allowed(
    specs: list[tuple[int, int, float, int]], finished: set[int], max_batch: int
) -> None:
    rows = [
        Row(number, "x", replace(SETTINGS, steps=steps, scale=scale), None, n_iter, n_samples)
        for number, (n_iter, n_samples, scale, steps) in enumerate(specs, start=1)
    ]
    planned = list(plan_images(rows, make_shared_settings(5)))
    images = [image for _, row_images in planned for image in row_images]
    batches = list(cut_batches(planned, (), max_batch))
    assert [image for batch in batches for image in batch.images] == images
    for batch in batches:
        assert len({image.settings.batch_key for image in batch.images}) == 1
    for batch, next_batch in pairwise(batches):
        first, second = batch.images[0], next_batch.images[0]
        assert len(batch.images) == max_batch or first.settings.batch_key != second.settings.batch_key
    whole = [batch.images for batch in batches]
    assert all(batch.images in whole for batch in cut_batches(planned, finished, max_batch))


def test_rows_share_a_batch_only_with_max_batch() -> None:
    planned = list(plan_images([make_row(number, None, 1, 1) for number in range(1, 6)], make_shared_settings(5)))
    assert [len(batch.images) for batch in cut_batches(planned, ())] == [1, 1, 1, 1, 1]
    assert [len(batch.images) for batch in cut_batches(planned, (), 2)] == [2, 2, 1]


def test_fixed_code_uses_the_seed_of_the_job_for_all_starting_noise() -> None:
    images = plan_requests([make_row(1, 7, 1, 2), make_row(2, None, 1, 1)], fixed_code=True)
    assert [(image.seed, image.noise_seed) for image in images] == [(7, 100), (8, 100), (102, 100)]


def test_file_names() -> None:
    assert format_file_name(7, 1, "webp") == "images/00000/seed_7_00001.webp"
    assert format_file_name(1234, 55) == "images/00000/seed_1234_00055.png"
    assert format_file_name(1, 10_000) == "images/00000/seed_1_10000.png"
    assert format_file_name(1, 10_001) == "images/00001/seed_1_10001.png"
    assert format_file_name(2**63 - 1, 1_234_567) == "images/00123/seed_9223372036854775807_1234567.png"


ROW_SPECS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([50, 20])),
    max_size=8,
)


@given(ROW_SPECS, st.sets(st.integers(1, 60)), st.one_of(st.none(), st.integers(1, 7)), st.integers(0, 60))
def test_counted_batches_equal_cut_batches(
    specs: list[tuple[int, int, float, int]], finished: set[int], max_batch: int | None, limit: int
) -> None:
    """For equal and different rows, with all, some or no images finished, arithmetic gives what cutting gives."""
    rows: list[Row | InvalidRow] = [
        replace(make_row(number, None, n_iter, n_samples), settings=replace(SETTINGS, steps=steps, scale=scale))
        for number, (n_iter, n_samples, scale, steps) in enumerate(specs, start=1)
    ]
    planned = list(plan_images(rows, make_shared_settings(5)))
    cut = list(cut_batches(planned, finished, max_batch))
    assert count_batches(planned, finished, max_batch) == len(cut)
    limited = [batch for batch in cut if any(index <= limit for index in batch.wanted)]
    assert count_batches(planned, finished, max_batch, limit) == len(limited)


def test_counting_batches_plans_no_image() -> None:
    rows: list[Row | InvalidRow] = [make_row(number, None, 25_000, 4) for number in range(1, 1001)]
    assert count_batches(plan_images(rows, make_shared_settings(5))) == 25_000_000
    assert count_batches(plan_images(rows, make_shared_settings(5)), range(1, 9), 8) == 12_499_999
