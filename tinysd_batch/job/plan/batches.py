"""Plan the images of each row, and cut them into micro-batches. Pure: the same manifest gives the same plan."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

from tinysd_batch.job.plan.image_id import compute_image_id
from tinysd_batch.records import ImageRequest, InvalidRow, MicroBatch, Row
from tinysd_batch.settings.limits import MAX_SEED
from tinysd_batch.settings.schema import IMAGE_SETTINGS, Settings, override

IMAGES_PER_FOLDER = 10_000
JOB_WIDE_IMAGE_SETTINGS = tuple(name for name, setting in IMAGE_SETTINGS.items() if not setting.is_column)
PROBE_PROMPT = "a red apple"


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """What all images of a job share."""

    seed: int
    model_digest: str
    settings: Settings
    of_images: tuple[tuple[str, Any], ...]  # name and value of the settings of images that a row cannot change

    @classmethod
    def from_settings(cls, seed: int, model_digest: str, settings: Settings) -> Self:
        of_images = tuple((name, getattr(settings, name)) for name in JOB_WIDE_IMAGE_SETTINGS)
        return cls(seed, model_digest, settings, of_images)


def format_file_name(seed: int, index: int, suffix: str = "png") -> str:
    """Return the path of an image in the job folder. The 55th image with seed 1234 is `seed_1234_00055.png`."""
    return f"images/{(index - 1) // IMAGES_PER_FOLDER:05d}/seed_{seed}_{index:05d}.{suffix}"


@dataclass(frozen=True, slots=True)
class RowImages:
    """The images of a row, each planned on request, as most of them may be finished."""

    row: Row
    first: int  # index of the first image
    shared_settings: SharedSettings

    def __len__(self) -> int:
        return self.row.n_images

    def __iter__(self) -> Iterator[ImageRequest]:
        return map(self.image, range(self.first, self.first + len(self)))

    def image(self, index: int) -> ImageRequest:
        """Plan the image with this index."""
        return plan_image(self.row, index - self.first + 1, index, self.shared_settings)


def plan_images(rows: Iterable[Row | InvalidRow], shared: SharedSettings) -> Iterator[tuple[Row, RowImages]]:
    """Yield each valid row with its images.

    A row has `n_iter * n_samples` images. If the row has a seed, they get seed, seed + 1, ...; otherwise an image gets
    the job's seed + index - 1 (modulo 2^63).
    """
    first = 1
    for row in rows:
        if not isinstance(row, InvalidRow):
            images = RowImages(row, first, shared)
            yield row, images
            first += len(images)


def plan_image(row: Row, sample: int, index: int, shared: SharedSettings) -> ImageRequest:
    """Plan an image: `sample` is its number in the row, `index` its number in the job, both from 1."""
    seed = (row.seed + sample - 1 if row.seed is not None else shared.seed + index - 1) % (MAX_SEED + 1)
    noise_seed = shared.seed if shared.settings.fixed_code else None
    settings = override(row.settings, shared.of_images)
    image_id = compute_image_id(
        model_digest=shared.model_digest,
        precision=shared.settings.precision,
        prompt=row.prompt,
        seed=seed,
        settings=settings,
        noise_seed=noise_seed,
    )
    return ImageRequest(
        prompt=row.prompt,
        seed=seed,
        settings=settings,
        noise_seed=noise_seed,
        image_id=image_id,
        index=index,
        row=row.number,
        sample=sample,
        file_name=format_file_name(seed, index, shared.settings.format),
        id=row.id,
        extra=row.extra,
    )


def cut_batches(
    planned: Iterable[tuple[Row, RowImages]], finished: Container[int], max_batch: int | None = None
) -> Iterator[MicroBatch]:
    """Yield micro-batches in manifest order, without those that are finished.

    Without `max_batch`, a micro-batch has up to `n_samples` images of one row; with it, up to `max_batch` images of
    adjacent rows that `can_share_batch`. Batches are cut before finished images are removed, so the composition of an
    image's batch does not depend on interruptions.
    """
    batch: list[tuple[RowImages, int]] = []  # each image as its row's images and its index
    for row, images in planned:
        batch_size = max_batch or row.n_samples
        for index in range(images.first, images.first + len(images)):
            if batch and (len(batch) >= batch_size or not can_share_batch(batch[0][0].row, row)):
                yield from build_batch(batch, finished)
                batch = []
            batch.append((images, index))
        if max_batch is None:
            yield from build_batch(batch, finished)
            batch = []
    yield from build_batch(batch, finished)


def can_share_batch(row: Row, other: Row) -> bool:
    """Whether images of two rows can be in one micro-batch."""
    return row.settings is other.settings or row.settings.batch_key == other.settings.batch_key


def build_batch(batch: Sequence[tuple[RowImages, int]], finished: Container[int]) -> Iterator[MicroBatch]:
    """Yield the micro-batch of these images, unless all of them are finished."""
    wanted = frozenset(index for _, index in batch if index not in finished)
    if wanted:
        yield MicroBatch(tuple(images.image(index) for images, index in batch), wanted)


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Images with consecutive indexes that are cut into micro-batches of equal size; the last one may be smaller."""

    first: int  # index of the first image
    images: int  # number of images
    size: int  # images per micro-batch

    def up_to(self, last_index: int) -> "BatchRange":
        """Return the part of the range with indexes up to `last_index`."""
        return BatchRange(self.first, max(0, min(self.images, last_index - self.first + 1)), self.size)

    @property
    def batches(self) -> int:
        """Number of micro-batches."""
        return -(-self.images // self.size)

    def count_finished_batches(self, finished: Sequence[int]) -> int:
        """Count the micro-batches in which all images are finished. `finished` has sorted, unique indexes."""
        start, end = bisect_left(finished, self.first), bisect_left(finished, self.first + self.images)
        if end - start == self.images:
            return self.batches
        finished_by_batch = Counter((index - self.first) // self.size for index in finished[start:end])
        last_size = self.images % self.size or self.size
        return sum(
            count == (last_size if batch == self.batches - 1 else self.size)
            for batch, count in finished_by_batch.items()
        )


def plan_batch_ranges(planned: Iterable[tuple[Row, RowImages]], max_batch: int | None = None) -> Iterator[BatchRange]:
    """Yield the ranges that `cut_batches` cuts into equal micro-batches, without planning single images.

    Without `max_batch`, each row is a range. With it, adjacent rows that can share batches form one.
    """
    if max_batch is None:
        yield from (BatchRange(images.first, len(images), row.n_samples) for row, images in planned)
        return
    for _, group in groupby(planned, key=lambda pair: pair[0].settings.batch_key):
        first, images = None, 0
        for _, row_images in group:
            first = row_images.first if first is None else first
            images += len(row_images)
        yield BatchRange(first or 1, images, max_batch)


def count_batches(
    planned: Iterable[tuple[Row, RowImages]],
    finished: Collection[int] = (),
    max_batch: int | None = None,
    last_index: int | None = None,
) -> int:
    """Count the micro-batches of `cut_batches` up to `last_index`, without planning single images."""
    sorted_finished = sorted(set(finished))
    ranges = plan_batch_ranges(planned, max_batch)
    limited = (each if last_index is None else each.up_to(last_index) for each in ranges)
    return sum(batch_range.batches - batch_range.count_finished_batches(sorted_finished) for batch_range in limited)


def split_into_single_images(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """Return one micro-batch per wanted image, to retry a chunk that killed its worker."""
    return [
        MicroBatch((image,), frozenset({image.index}))
        for batch in batches
        for image in batch.images
        if image.index in batch.wanted
    ]


def make_probe_request(settings: Settings) -> ImageRequest:
    """Return an image of no row, with index 0 and no file, to test whether a worker can generate images at all."""
    plain = tuple(
        (name, each.default)
        for name, each in IMAGE_SETTINGS.items()
        if not each.is_shared_in_batch and not each.model_default
    )
    return ImageRequest(PROBE_PROMPT, 1, override(settings.image_settings(), plain), index=0, row=0)
