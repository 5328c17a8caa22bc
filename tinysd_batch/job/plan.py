"""From rows to images, and from images to micro-batches. Pure: the same manifest always gives the same plan."""

from collections.abc import Container, Iterable, Iterator

from tinysd_batch.config import MAX_SEED
from tinysd_batch.job.identity import image_id
from tinysd_batch.records import ImageRequest, InvalidRow, MicroBatch, Row

IMAGES_PER_FOLDER = 10_000


def file_name(seed: int, index: int) -> str:
    """Where the image lies, relative to the job folder. The 55th image with seed 1234 is `seed_1234_00055.png`."""
    return f"images/{(index - 1) // IMAGES_PER_FOLDER:05d}/seed_{seed}_{index:05d}.png"


def plan_images(
    rows: Iterable[Row | InvalidRow], *, job_seed: int, model_digest: str, precision: str
) -> Iterator[tuple[Row, list[ImageRequest]]]:
    """Each valid row with its images.

    A row makes `n_iter * n_samples` images. With a seed of its own they get seed, seed + 1, ...; without one an image
    gets the job's seed + index - 1 (modulo 2^63).
    """
    index = 0
    for row in rows:
        if isinstance(row, InvalidRow):
            continue
        images = []
        for sample in range(1, row.n_iter * row.n_samples + 1):
            index += 1
            seed = row.seed + sample - 1 if row.seed is not None else (job_seed + index - 1) % (MAX_SEED + 1)
            identity = image_id(
                model_digest=model_digest, prompt=row.prompt, negative_prompt=row.negative_prompt, seed=seed,
                scale=row.scale, params=row.params, precision=precision,
            )  # fmt: skip
            images.append(
                ImageRequest(
                    index=index, row=row.number, sample=sample, prompt=row.prompt, negative_prompt=row.negative_prompt,
                    seed=seed, scale=row.scale, params=row.params, image_id=identity,
                    file_name=file_name(seed, index), id=row.id, extra=row.extra,
                )
            )  # fmt: skip
        yield row, images


def cut_batches(planned: Iterable[tuple[Row, list[ImageRequest]]], finished: Container[int]) -> Iterator[MicroBatch]:
    """Micro-batches of `n_samples` images, in manifest order, without those that are finished already.

    They are cut before finished images are dropped, so an image keeps its company whatever was interrupted.
    """
    for row, images in planned:
        for start in range(0, len(images), row.n_samples):
            together = tuple(images[start : start + row.n_samples])
            wanted = frozenset(image.index for image in together if image.index not in finished)
            if wanted:
                yield MicroBatch(together, wanted)


def split_to_singles(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """Each image still wanted in a batch of its own: how a chunk that killed its worker is tried again."""
    return [
        MicroBatch((image,), frozenset({image.index}))
        for batch in batches
        for image in batch.images
        if image.index in batch.wanted
    ]
