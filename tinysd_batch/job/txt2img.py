"""Generate images for a few prompts in this process into a plain folder, as tiny-stable-diffusion's script does."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinysd_batch.job.plan.batches import SharedSettings, cut_batches, format_file_name, plan_images
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Row

NUMBERED_FILE_NAME = re.compile(r"seed_\d+_(\d{1,15})\.", re.ASCII)


def find_highest_image_number(folder: Path) -> int:
    """Return the highest image number in a folder, so that a second run adds images to it; 0 if it has none."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for name in names if (match := NUMBERED_FILE_NAME.match(name))), default=0)


def generate_rows(
    rows: Sequence[Row], setup: WorkerSetup, shared_settings: SharedSettings, max_batch: int | None
) -> Iterator[tuple[ImageRequest, ImageResult]]:
    """Generate the images of the rows into `setup.job_folder`, numbered after those in the folder.

    Yields each image with its result.
    """
    offset = find_highest_image_number(setup.job_folder)
    planned = plan_images(rows, shared_settings)
    batches = [renumber_batch(batch, offset) for batch in cut_batches(planned, (), max_batch)]
    requests = {image.index: image for batch in batches for image in batch.images}
    worker = Worker(setup, "inline")
    for results in worker.generate(batches):
        for result in results:
            yield requests[result.index], result


def renumber_batch(batch: MicroBatch, offset: int) -> MicroBatch:
    """Add `offset` to the index of each image."""
    images = tuple(renumber_image(image, offset) for image in batch.images)
    return MicroBatch(images, frozenset(image.index for image in images))


def renumber_image(image: ImageRequest, offset: int) -> ImageRequest:
    """Add `offset` to the index of an image, and place its file directly in the folder."""
    index = image.index + offset
    suffix = image.file_name.rpartition(".")[2]
    return replace(image, index=index, file_name=Path(format_file_name(image.seed, index, suffix)).name)
