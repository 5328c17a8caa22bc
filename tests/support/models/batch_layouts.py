"""Generate the same rows in several batch layouts, and compare the images."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tinysd_batch.job.manifest.validate import RowDefaults, build_row
from tinysd_batch.job.plan.batches import SharedSettings, cut_batches, plan_images
from tinysd_batch.job.ray_workers.pool import RayPool
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.pool import BatchDone, ChunkDone, WorkerPool
from tinysd_batch.job.workers.worker import WorkerSetup
from tinysd_batch.model.checkpoint.info import read_model_info
from tinysd_batch.records import MicroBatch, Row, Status
from tinysd_batch.settings.sampler_names import SAMPLERS
from tinysd_batch.settings.schema import Settings

IMAGES_PER_ROW = 4
PROMPTS = (("red apple", "", 3.0), ("panda", "red", 5.0), ("ghost:1 skull:2", "", 1.0))  # prompt, negative, scale
ImagesById = dict[str, npt.NDArray[np.int16]]


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """One way to divide the same images into micro-batches, workers and an order."""

    name: str
    n_samples: int
    max_batch: int | None = None
    ray_workers: int = 0
    shuffled: bool = False


LAYOUTS = (
    BatchLayout("one at a time", 1),
    BatchLayout("n_samples 2", 2),
    BatchLayout("n_samples 4", 4),
    BatchLayout("rows mixed, 3 in a batch", 1, max_batch=3),
    BatchLayout("two Ray workers, shuffled, n_samples 4", 4, ray_workers=2, shuffled=True),
)


def iter_rows(settings: Settings, n_samples: int) -> Iterator[Row]:
    """Yield rows with all samplers and prompts; `n_samples` images of a row share a micro-batch."""
    model = read_model_info(settings.model)
    defaults = RowDefaults(settings, model)
    variants = [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.5), ("plms", 0.5)]
    number = 0
    for sampler, eta in variants:
        for prompt, negative, scale in PROMPTS:
            number += 1
            values = {
                "prompt": prompt, "negative_prompt": negative, "scale": scale, "sampler": sampler, "eta": eta,
                "seed": 10 * number, "n_iter": IMAGES_PER_ROW // n_samples, "n_samples": n_samples,
            }  # fmt: skip
            row = build_row(number, values, defaults)
            assert isinstance(row, Row), row
            yield row


def generate_with_layout(layout: BatchLayout, settings: Settings, folder: Path) -> ImagesById:
    """Generate all images in this layout, and read them back from their files."""
    model = read_model_info(settings.model)
    shared = SharedSettings.from_settings(1, model.digest, settings)
    batches = list(cut_batches(plan_images(iter_rows(settings, layout.n_samples), shared), (), layout.max_batch))
    if layout.shuffled:
        random.Random(7).shuffle(batches)
    setup = WorkerSetup.from_settings(settings, model, job_folder=folder, scratch=folder / "_tinysd" / "tmp")
    with RayPool(setup, layout.ray_workers, layout.ray_workers) if layout.ray_workers else InlinePool(setup) as pool:
        run_batches(pool, batches)
    return {image.image_id: read_image(folder / image.file_name) for batch in batches for image in batch.images}


def run_batches(pool: WorkerPool, batches: Sequence[MicroBatch]) -> None:
    """Run the micro-batches one by one on whichever worker is idle."""
    waiting, busy = list(batches), 0
    while waiting or busy:
        for worker in pool.idle_workers():
            if waiting:
                pool.submit(worker, [waiting.pop(0)])
                busy += 1
        for event in pool.wait_for_events(0.5):
            busy -= isinstance(event, ChunkDone)
            if isinstance(event, BatchDone):
                assert all(result.status is Status.OK for result in event.results), event.results


def read_image(path: Path) -> npt.NDArray[np.int16]:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.int16)


def compare_images(first: ImagesById, second: ImagesById) -> tuple[int, int]:
    """Return the largest difference of any channel, and how many images differ."""
    assert first.keys() == second.keys()
    differences = [int(np.abs(first[image_id] - second[image_id]).max()) for image_id in first]
    return max(differences), sum(difference > 0 for difference in differences)
