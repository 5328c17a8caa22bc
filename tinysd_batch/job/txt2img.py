"""A few prompts, drawn in this process into a plain folder, as the origin's script does."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinysd_batch.job.plan.batches import SharedSettings, cut_batches, format_file_name, plan_images
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Row

NUMBERED_FILE_NAME = re.compile(r"seed_\d+_(\d{1,15})\.", re.ASCII)


def find_highest_image_number(folder: Path) -> int:
    """The highest number among the folder's pictures, so that a second run adds to it; 0 where there are none."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for name in names if (match := NUMBERED_FILE_NAME.match(name))), default=0)


def generate_rows(
    rows: Sequence[Row], setup: WorkerSetup, common: SharedSettings, max_batch: int | None
) -> Iterator[tuple[ImageRequest, ImageResult]]:
    """Draw the rows' images into `setup.job_folder`, numbered on from the highest there."""
    offset = find_highest_image_number(setup.job_folder)
    batches = [renumber_batch(batch, offset) for batch in cut_batches(plan_images(rows, common), (), max_batch)]
    requests = {image.index: image for batch in batches for image in batch.images}
    worker = Worker(setup, "inline")
    for results in worker.generate(batches):
        for result in results:
            yield requests[result.index], result


def renumber_batch(batch: MicroBatch, offset: int) -> MicroBatch:
    images = tuple(renumber_image(image, offset) for image in batch.images)
    return MicroBatch(images, frozenset(image.index for image in images))


def renumber_image(image: ImageRequest, offset: int) -> ImageRequest:
    index = image.index + offset
    return replace(
        image, index=index, file_name=Path(format_file_name(image.seed, index, image.file_name.rpartition(".")[2])).name
    )
