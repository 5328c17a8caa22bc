"""A worker: a model on one device that turns micro-batches into image files and small records.

This is the only place where the job layer uses the model. Pixels never leave the worker's process: images are encoded
and published here, and only their records are sent back.
"""

import gc
import logging
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tinysd_batch.errors import BrokenWorkerError, OccupiedPathError
from tinysd_batch.images import ModelLabel, describe_request
from tinysd_batch.job.results.columns import EMBEDDED_COLUMNS, OUTPUT_COLUMNS
from tinysd_batch.job.state.precision_record import choose_recorded_precision, describe_precision
from tinysd_batch.job.workers.adopt_images import (
    METADATA_SCHEMA_VERSION,
    add_file_columns,
    adopt_image,
    read_embedded_record,
)
from tinysd_batch.job.workers.faults import FAULT_POLICIES, FaultAction, FaultType, classify_error, get_error_class
from tinysd_batch.job.workers.oom_fallback import (
    BATCH_HALVED,
    BATCH_SPLIT,
    ImageShape,
    MemoryLimits,
    get_image_shape,
    split_evenly,
)
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status
from tinysd_batch.settings.schema import Settings
from tinysd_batch.storage.atomic import publish
from tinysd_batch.storage.filesystem import storage_errors
from tinysd_batch.version import __version__

if TYPE_CHECKING:
    from tinysd_batch.model.device.precision import Precision
    from tinysd_batch.model.sampling.batch import ImageOutput
    from tinysd_batch.model.tiny_sd import TinySD

logger = logging.getLogger(__name__)
MAX_MESSAGE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Everything that a worker needs to start."""

    job_folder: Path
    scratch: Path  # for image files while they are written
    model_path: Path
    model_name: str
    model_digest: str
    settings: Settings
    threads: int = 1  # of torch, on the CPU
    stop_file: Path | None = None  # once it exists, no further micro-batch is started
    precision_file: Path | None = None  # what `auto` chose in this job, see `job.state.precision_record`

    @classmethod
    def from_settings(cls, settings: Settings, model: ModelInfo, **paths_and_threads: Any) -> Self:
        """Return the setup of a worker for these settings and this model."""
        return cls(
            model_path=model.path.resolve(),
            model_name=model.name,
            model_digest=model.digest,
            settings=settings,
            **paths_and_threads,
        )

    @property
    def label(self) -> ModelLabel:
        return ModelLabel(self.model_name, self.model_digest, __version__)


class Worker:
    """Generates images on one device. There is one per device, for the lifetime of its process."""

    def __init__(self, setup: WorkerSetup, name: str, model: "TinySD | None" = None) -> None:
        """Load the model that `setup` names, unless one is given."""
        self.setup = setup
        self.name = name
        self.memory_limits: defaultdict[ImageShape, MemoryLimits] = defaultdict(MemoryLimits)
        self.model = model or load_model(setup)

    def describe(self) -> dict[str, Any]:
        """Return what the driver shows and checks: version, model, precision, device, process."""
        return {
            "version": __version__,
            "model_digest": self.model.info.digest,
            **describe_precision(self.model),
            "device_name": self.model.device_name,
            "node": platform.node(),
            "pid": os.getpid(),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }

    def generate(self, batches: Sequence[MicroBatch]) -> Iterator[list[ImageResult]]:
        """Generate each micro-batch's wanted images, and yield their results once the files are on disk.

        Stops early, between micro-batches, when the stop file exists: an actor cannot receive a call during a call.
        """
        for batch in batches:
            if self.setup.stop_file is not None and self.setup.stop_file.exists():
                return
            yield self.generate_batch(batch)

    def generate_batch(self, batch: MicroBatch) -> list[ImageResult]:
        """Return the results of the wanted images. A batch with none wanted is a trial: its image is discarded."""
        if not batch.wanted:
            return self.generate_images(batch.images, batch.wanted) or [ImageResult(batch.images[0].index, Status.OK)]
        wanted = [image for image in batch.images if image.index in batch.wanted]
        adopted = [result for image in wanted if (result := adopt_image(self.setup.job_folder, image))]
        missing = batch.wanted - {result.index for result in adopted}
        return adopted + (self.generate_images(batch.images, missing) if missing else [])

    def generate_images(self, images: Sequence[ImageRequest], wanted: frozenset[int]) -> list[ImageResult]:
        """Generate and publish images. Handle failures as `FAULT_POLICIES` says, so that an image fails alone.

        Raises:
            StorageError: the storage failed, and retries did not help.
            BrokenWorkerError: this process can generate no more images.
        """
        limits = self.memory_limits[get_image_shape(images[0])]
        batches = split_evenly(images, limits.max_batch)
        if len(batches) > 1:
            return self.generate_separately(batches, wanted, BATCH_HALVED)
        try:
            with limits.apply(self.model):
                return self.generate_and_publish(images, wanted)
        except Exception as error:
            fault = classify_error(error)
            action = FAULT_POLICIES[fault].action
            if action in (FaultAction.STOP_JOB, FaultAction.RETRY_WITH_BACKOFF):  # the storage layer has retried
                raise
            if action is FaultAction.SUSPECT:
                raise BrokenWorkerError(
                    f"{self.name}: the device is in a broken state: {first_message_line(error)}"
                ) from None
            failure = get_error_class(error), first_message_line(error)
        # Outside of `except` the error no longer keeps the attempt's tensors alive.
        return self.retry_with_less_memory_or_alone(images, wanted, fault, limits, failure)

    def retry_with_less_memory_or_alone(
        self,
        images: Sequence[ImageRequest],
        wanted: frozenset[int],
        fault: FaultType,
        limits: MemoryLimits,
        failure: tuple[str, str],
    ) -> list[ImageResult]:
        """Retry with less memory, or one image at a time, or return the failure of a single image.

        Args:
            images: the images of the batch that failed.
            wanted: the indexes of those that need a result.
            fault: why they failed.
            limits: the limits of their shape, to which a fallback is added.
            failure: error class and message.
        """
        if fault is FaultType.OUT_OF_MEMORY:
            release_memory()
            if limits.next_fallback(len(images), self.model):
                width, height, _ = get_image_shape(images[0])
                logger.info("out of memory at %dx%d; from now on %s", width, height, limits)
                return self.generate_images(images, wanted)
        if len(images) == 1:
            return [self.make_failed_result(images[0], *failure)]
        return self.generate_separately([[image] for image in images], wanted, BATCH_SPLIT)

    def generate_separately(
        self, batches: Sequence[Sequence[ImageRequest]], wanted: frozenset[int], degraded: str
    ) -> list[ImageResult]:
        """Generate smaller batches one after the other, and note `degraded` in their results."""
        results: list[ImageResult] = []
        for batch in batches:
            if wanted_in_batch := wanted & {image.index for image in batch}:
                results += self.generate_images(batch, wanted_in_batch)
        for result in results:
            result.degraded += [degraded] if degraded not in result.degraded else []
        return results

    def make_failed_result(self, request: ImageRequest, error_class: str, message: str) -> ImageResult:
        now = time.time()
        return ImageResult(
            request.index,
            Status.FAILED,
            error_class=error_class,
            error_message=message,
            device_name=self.model.device_name,
            worker=self.name,
            node=platform.node(),
            started_at=now,
            finished_at=now,
        )

    def generate_and_publish(self, images: Sequence[ImageRequest], wanted: frozenset[int]) -> list[ImageResult]:
        """Call the model once for all images, and publish the wanted ones."""
        started = time.time()
        outputs = self.model.generate_images(images)
        return [self.publish_or_fail(output, started) for output in outputs if output.request.index in wanted]

    def publish_or_fail(self, output: "ImageOutput", started: float) -> ImageResult:
        """Publish one image of a batch. If its path is occupied by another file, only this image fails."""
        try:
            return self.publish(output, started)
        except OccupiedPathError as error:
            return self.make_failed_result(output.request, get_error_class(error), first_message_line(error))

    def publish(self, output: "ImageOutput", started: float) -> ImageResult:
        """Encode one image of a batch with its metadata, publish the file, and return the result."""
        from tinysd_batch.images import FileFormat, encode_image, format_webui_parameters

        request = output.request
        result = ImageResult(
            request.index,
            Status.OK,
            **{name: getattr(output, name) for name in OUTPUT_COLUMNS},
            device_name=self.model.device_name,
            worker=self.name,
            node=platform.node(),
            started_at=started,
            finished_at=time.time(),
        )
        result.degraded = output.degraded + self.memory_limits[get_image_shape(request)].fallback_names()
        settings = self.setup.settings
        if settings.skip_save:
            return result
        file_format = FileFormat(settings.format, settings.quality, not settings.no_metadata)
        parameters = format_webui_parameters(request, self.setup.label)
        data = encode_image(output.image, file_format, parameters, self.build_metadata(request, result))
        path = self.setup.job_folder / request.file_name
        with storage_errors(path):
            published = publish(
                data, path, self.setup.scratch, lambda existing: read_embedded_record(existing, request) is not None
            )
        return add_file_columns(result, request, published)

    def build_metadata(self, request: ImageRequest, result: ImageResult) -> dict[str, Any]:
        """Return the image's `tinysd` metadata: identity, settings, and the columns that a resumed run adopts."""
        return {
            "schema": METADATA_SCHEMA_VERSION,
            "image_id": request.image_id,
            **describe_request(request, self.setup.label),
            "made": {name: getattr(result, name) for name in EMBEDDED_COLUMNS},
        }


def load_model(setup: WorkerSetup) -> "TinySD":
    """Load the model. Raises UsageError if the model or the device cannot be used."""
    import torch

    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.model.device.select import choose_device
    from tinysd_batch.model.tiny_sd import TinySD

    torch.set_num_threads(setup.threads)
    settings = setup.settings
    device = choose_device(None if settings.device == "auto" else settings.device)
    precision: Precision = settings.precision
    if precision == "auto":
        is_small = read_model_info(str(setup.model_path)).is_small
        precision = choose_recorded_precision(setup.precision_file, device, is_small=is_small)
    return TinySD.from_pretrained(
        setup.model_path,
        device=device,
        dtype=precision,
        vram_budget=settings.vram_budget,
        turbo=settings.turbo,
        unet_bs=settings.unet_bs,
    )


def first_message_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:MAX_MESSAGE_CHARACTERS]


def release_memory() -> None:
    """Free the memory of a failed attempt, on the host and on the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
