"""From rows to images, and from images to micro-batches. Pure: the same manifest always gives the same plan."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from tinysd_batch.config import MAX_SEED, Settings
from tinysd_batch.job.plan.image_id import compute_image_id
from tinysd_batch.records import ImageRequest, InvalidRow, MicroBatch, Row, SamplingParams

IMAGES_PER_FOLDER = 10_000


@dataclass(frozen=True, slots=True)
class SharedSettings:
    """What all images of a job have in common and no row says."""

    seed: int
    model_digest: str
    precision: str = "auto"
    long_prompts: bool = False
    fixed_code: bool = False  # every image starts from the noise of the job's seed
    suffix: str = "png"
    rng: str = "cpu"  # whose noise: that of torch's generator on the CPU, or on a CUDA card


def format_file_name(seed: int, index: int, suffix: str = "png") -> str:
    """Where the image lies, relative to the job folder. The 55th image with seed 1234 is `seed_1234_00055.png`."""
    return f"images/{(index - 1) // IMAGES_PER_FOLDER:05d}/seed_{seed}_{index:05d}.{suffix}"


@dataclass(frozen=True, slots=True)
class RowImages:
    """A row's images, each worked out when it is asked for: most of them may be finished."""

    row: Row
    first: int  # index of the first
    shared_settings: SharedSettings

    def __len__(self) -> int:
        return self.row.n_iter * self.row.n_samples

    def __iter__(self) -> Iterator[ImageRequest]:
        return map(self.image, range(self.first, self.first + len(self)))

    def image(self, index: int) -> ImageRequest:
        return plan_image(self.row, index - self.first + 1, index, self.shared_settings)


def plan_images(rows: Iterable[Row | InvalidRow], common: SharedSettings) -> Iterator[tuple[Row, RowImages]]:
    """Each valid row with its images.

    A row makes `n_iter * n_samples` images. With a seed of its own they get seed, seed + 1, ...; without one an image
    gets the job's seed + index - 1 (modulo 2^63).
    """
    first = 1
    for row in rows:
        if not isinstance(row, InvalidRow):
            images = RowImages(row, first, common)
            yield row, images
            first += len(images)


def plan_image(row: Row, sample: int, index: int, common: SharedSettings) -> ImageRequest:
    seed = (row.seed + sample - 1 if row.seed is not None else common.seed + index - 1) % (MAX_SEED + 1)
    noise_seed = common.seed if common.fixed_code else None
    identity = compute_image_id(
        model_digest=common.model_digest, prompt=row.prompt, negative_prompt=row.negative_prompt, seed=seed,
        scale=row.scale, params=row.params, precision=common.precision, prompt_syntax=row.prompt_syntax,
        long_prompts=common.long_prompts, noise_seed=noise_seed, rng=common.rng,
    )  # fmt: skip
    return ImageRequest(
        index=index, row=row.number, sample=sample, prompt=row.prompt, negative_prompt=row.negative_prompt,
        seed=seed, scale=row.scale, params=row.params, image_id=identity,
        file_name=format_file_name(seed, index, common.suffix), prompt_syntax=row.prompt_syntax, noise_seed=noise_seed,
        id=row.id, extra=row.extra,
    )  # fmt: skip


def cut_batches(
    planned: Iterable[tuple[Row, RowImages]], finished: Container[int], max_batch: int | None = None
) -> Iterator[MicroBatch]:
    """Micro-batches in manifest order, without those that are finished already.

    A row's images go `n_samples` at a time. With `max_batch` so many go together, of neighbouring rows too, as far as
    they go through the same steps. Batches are cut before finished images are dropped, so an image keeps its company
    whatever was interrupted.
    """
    together: list[tuple[RowImages, int]] = []  # and the index in the job
    for row, images in planned:
        most = max_batch or row.n_samples
        for index in range(images.first, images.first + len(images)):
            if together and (len(together) >= most or not can_share_batch(together[0][0].row, row)):
                yield from build_batch(together, finished)
                together = []
            together.append((images, index))
        if max_batch is None:
            yield from build_batch(together, finished)
            together = []
    yield from build_batch(together, finished)


def can_share_batch(one: Row, other: Row) -> bool:
    """Whether their images can share a batch: the same size, sampler, steps and eta, and guidance on or off."""
    return one is other or (one.params == other.params and (one.scale == 1) == (other.scale == 1))


def build_batch(together: Sequence[tuple[RowImages, int]], finished: Container[int]) -> Iterator[MicroBatch]:
    wanted = frozenset(index for _, index in together if index not in finished)
    if wanted:
        yield MicroBatch(tuple(images.image(index) for images, index in together), wanted)


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Images with consecutive indexes that are cut into micro-batches of `size` from the first on."""

    first: int
    images: int
    size: int

    def up_to(self, last_index: int) -> "BatchRange":
        """The part of it with indexes up to `last_index`."""
        return BatchRange(self.first, max(0, min(self.images, last_index - self.first + 1)), self.size)

    @property
    def batches(self) -> int:
        return -(-self.images // self.size)

    def count_finished_batches(self, finished: Sequence[int]) -> int:
        """How many batches have no image left. `finished`: sorted indexes without repetition."""
        start, end = bisect_left(finished, self.first), bisect_left(finished, self.first + self.images)
        if end - start == self.images:
            return self.batches
        there = Counter((index - self.first) // self.size for index in finished[start:end])
        rest = self.images % self.size or self.size  # images of the last batch
        return sum(number == (rest if batch == self.batches - 1 else self.size) for batch, number in there.items())


def plan_batch_ranges(planned: Iterable[tuple[Row, RowImages]], max_batch: int | None = None) -> Iterator[BatchRange]:
    """The runs of images that `cut_batches` cuts alike, without looking at a single image.

    Without `max_batch` each row is a run; with it neighbouring rows that can share batches are one.
    """
    if max_batch is None:
        yield from (BatchRange(images.first, len(images), row.n_samples) for row, images in planned)
        return
    for _, run in groupby(planned, key=lambda pair: (pair[0].params, pair[0].scale == 1)):
        first, images = None, 0
        for _, row_images in run:
            first = row_images.first if first is None else first
            images += len(row_images)
        yield BatchRange(first or 1, images, max_batch)


def count_batches(
    planned: Iterable[tuple[Row, RowImages]], finished: Collection[int] = (), max_batch: int | None = None,
    last_index: int | None = None,
) -> int:  # fmt: skip
    """How many micro-batches `cut_batches` gives, without making images; those beyond `last_index` do not count."""
    in_order = sorted(set(finished))
    runs = (run if last_index is None else run.up_to(last_index) for run in plan_batch_ranges(planned, max_batch))
    return sum(run.batches - run.count_finished_batches(in_order) for run in runs)


def split_into_single_images(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """Each image still wanted in a batch of its own: how a chunk that killed its worker is tried again."""
    return [
        MicroBatch((image,), frozenset({image.index}))
        for batch in batches
        for image in batch.images
        if image.index in batch.wanted
    ]


def make_probe_request(settings: Settings) -> ImageRequest:
    """A picture that no row asked for: what shows whether a worker can draw at all. Its index is 0, it has no file."""
    assert settings.width is not None
    assert settings.height is not None
    assert settings.steps is not None
    assert settings.scale is not None
    params = SamplingParams(settings.width, settings.height, settings.steps, settings.sampler, settings.eta)
    return ImageRequest(0, 0, 1, "a red apple", "", 1, settings.scale, params, image_id="", file_name="")
