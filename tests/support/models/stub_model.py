"""A stub model that takes a given time per image, to measure and to break the job layer around it.

Everything else is real: workers, image files with their metadata, the results table.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from PIL import Image

from tinysd_batch.job.dispatch.job_progress import InvalidRows
from tinysd_batch.job.ray_workers.pool import RayPool
from tinysd_batch.job.ray_workers.worker_process import WorkerProcess
from tinysd_batch.job.workers.pool import WorkerLost, WorkerReady
from tinysd_batch.job.workers.worker import WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult

STUB_IMAGE_PX = 64
STUB_MODEL_PREFIX = "trivial:"  # of `WorkerSetup.model_name`; the seconds per image follow


class StubModel:
    """Generates one flat colour per seed, in `seconds` per image."""

    device_name = "none"
    device = SimpleNamespace(type="none")
    precision = SimpleNamespace(name="float32", reason="it computes nothing", replaces=None)

    def __init__(self, seconds: float = 0.0, digest: str = "") -> None:
        self.seconds = seconds
        self.info = SimpleNamespace(digest=digest)

    def generate_images(self, requests: Sequence[ImageRequest]) -> list[Any]:
        end = time.perf_counter() + self.seconds * len(requests)
        images = [
            Image.new("RGB", (STUB_IMAGE_PX, STUB_IMAGE_PX), tuple(request.seed.to_bytes(8, "big")[-3:]))
            for request in requests
        ]
        if (remaining_s := end - time.perf_counter()) > 0:
            time.sleep(remaining_s)
        return [
            SimpleNamespace(
                request=request, image=image, n_tokens=1, truncated=None, negative_truncated=None, degraded=[],
                precision="float32", text_s=0.0, denoise_s=self.seconds / len(requests), decode_s=0.0,
                peak_memory_bytes=0,
            )
            for request, image in zip(requests, images, strict=True)
        ]  # fmt: skip


class StubWorkerProcess(WorkerProcess):
    """A worker process with the stub model."""

    model_class: type[StubModel] = StubModel

    def __init__(self, setup: WorkerSetup, name: str) -> None:
        seconds = float(setup.model_name.removeprefix(STUB_MODEL_PREFIX))
        super().__init__(setup, name, self.model_class(seconds, setup.model_digest))  # type: ignore[arg-type]


class StubRayPool(RayPool):
    """Real Ray actors with the stub model, which takes `seconds` per image."""

    worker_class = StubWorkerProcess

    def __init__(self, setup: WorkerSetup, workers: int, seconds: float = 0.0, **more: Any) -> None:
        super().__init__(replace(setup, model_name=f"{STUB_MODEL_PREFIX}{seconds}"), workers, workers, **more)


class SilentProgress:
    """Ignores all progress."""

    def report_start(self, total: int, finished: int, invalid: InvalidRows) -> None: ...
    def report_worker(self, event: WorkerReady | WorkerLost) -> None: ...
    def report_image(self, request: ImageRequest, result: ImageResult) -> None: ...
    def note(self, line: str) -> None: ...
    def report_flush(self) -> None: ...
