"""Measure what the job layer adds to the images themselves, beside Ray Data on the same work in the same run.

    python -m benchmarks.job_layer [--images 1000] [--rows 100000]

An image here takes 50 ms, its encoding and its synced file included: the stand-in for the model sleeps for what these
leave of it. Measured from the first chunk handed out to the last durable row; starting Ray and the workers is apart.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.trivial import SIDE_PX, Silent, TrivialModel, TrivialPool, TrivialProcess
from tinysd_batch.config import Settings
from tinysd_batch.job.cluster import start_ray, stop_ray
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.folder import Job, open_job
from tinysd_batch.job.pool import InlinePool
from tinysd_batch.job.worker import Worker, WorkerSetup, usable_cores
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch
from tinysd_batch.report.status import read_status

IMAGE_S = 0.05
WORKERS = 2


class PacedProcess(TrivialProcess):
    """Takes `IMAGE_S` for an image and its file together."""

    def generate_batch(self, batch: MicroBatch) -> list[ImageResult]:
        end = time.perf_counter() + IMAGE_S * len(batch.images)
        results = super().generate_batch(batch)
        time.sleep(max(0.0, end - time.perf_counter()))
        return results


class PacedPool(TrivialPool):
    """Notes when the first chunk was handed out, which is once all workers are ready."""

    process = PacedProcess
    first_chunk = 0.0

    def idle(self) -> list[str]:
        return super().idle() if all(slot.ready or slot.deaths for slot in self.slots) else []

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        PacedPool.first_chunk = PacedPool.first_chunk or time.perf_counter()
        super().submit(worker, chunk)


class Clocked(Silent):
    """Notes when rows were last made durable."""

    last_durable = 0.0

    def durable(self) -> None:
        self.last_durable = time.perf_counter()


def line(what: str, value: str) -> None:
    print(f"{what:<72} {value}", flush=True)


def make_job(folder: Path, images: int) -> Job:
    manifest = folder / "m.csv"
    manifest.write_text("prompt\n" + "".join(f"p{number}\n" for number in range(images)))
    return open_job(manifest, folder / "job", Settings(height=SIDE_PX, width=SIDE_PX, seed=1))


def setup_for(job: Job) -> WorkerSetup:
    return WorkerSetup.of(job.settings, job.model, job_folder=job.folder, scratch=job.scratch, stop_file=job.stop_file)


def paced_run(images: int) -> tuple[float, float]:
    """Seconds from the first chunk handed out to the last durable row; the driver's processor seconds in all."""
    processor_s = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), images)
        clock = Clocked()
        PacedPool.first_chunk = 0.0
        summary = run_job(job, lambda _: PacedPool(setup_for(job), WORKERS), clock, lambda: False)
        assert summary.counts["ok"] == images  # type: ignore[index]
    return clock.last_durable - PacedPool.first_chunk, time.process_time() - processor_s


def ray_data_run(images: int) -> float:
    """The same images by `map_batches` on as many actors: first dispatch to the last row written as Parquet."""
    import ray

    start_ray({})
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), images)
        setup = replace(setup_for(job), model_name="trivial:0.0")
        job.scratch.mkdir(parents=True)

        class Draw:
            def __init__(self) -> None:
                self.worker = PacedProcess(setup, "data")

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                made = [self.worker.generate_batch(one_image(job, int(number)))[0] for number in rows["id"]]
                return {"index": [row.index for row in made], "sha256": [row.sha256 for row in made]}

        started = time.perf_counter()  # half a core for each actor leaves one for reading and writing
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.range(images, override_num_blocks=max(WORKERS, images // 16)).map_batches(
            Draw, batch_size=16, compute=ray.data.ActorPoolStrategy(size=WORKERS), num_cpus=0.5
        ).write_parquet(folder + "/rows")
        elapsed = time.perf_counter() - started
        assert len(list(job.folder.rglob("seed_*"))) == images
    stop_ray()
    return elapsed


def one_image(job: Job, number: int) -> MicroBatch:
    from tinysd_batch.job.plan import neutral_image

    image: ImageRequest = replace(
        neutral_image(job.settings), index=number + 1, seed=number, file_name=f"images/00000/seed_{number}.png"
    )
    return MicroBatch((image,), frozenset({image.index}))


def measure_efficiency(images: int) -> None:
    ideal = images * IMAGE_S / WORKERS
    ours, processor_s = paced_run(images)
    try:
        theirs = f"{(took := ray_data_run(images)):.2f} s, {ideal / took:.1%}"
    except ImportError as error:
        theirs = f"not measured: {error}"
    again, _ = paced_run(images)
    best = statistics.mean([ours, again])
    line(f"{images:,} images of {1000 * IMAGE_S:.0f} ms on {WORKERS} workers, at best", f"{ideal:.2f} s")
    line("  tinysd-batch, two runs, first dispatch to last durable row", f"{ours:.2f} and {again:.2f} s")
    line("  efficiency", f"{ideal / ours:.1%} and {ideal / again:.1%}")
    line("  overhead per image and worker", f"{1000 * (best - ideal) / (images / WORKERS):.2f} ms")
    line("  overhead per image", f"{1000 * (best - ideal) / images:.2f} ms")
    line("  the driver's processor time per image, Ray's start included", f"{1000 * processor_s / images:.2f} ms")
    line("  Ray Data map_batches, 16 at a time, actors' start included", theirs)


def measure_large_manifest(rows: int) -> None:
    """Planning, running, status, resuming and finding nothing to do, in this process, with no time for the model."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), rows)

        def run(stop: Callable[[], bool] = lambda: False, limit: int | None = None) -> float:
            started = time.perf_counter()
            run_job(job, open_inline(job), Silent(), stop, limit)
            return time.perf_counter() - started

        line(f"{rows:,} rows: planned and nothing drawn", f"{run(lambda: True):.1f} s")
        half = run(limit=rows // 2)
        line("  the first half drawn, each picture synced", f"{half:.1f} s, {1000 * half / (rows / 2):.2f} ms an image")
        line("  status, in the middle", f"{seconds(lambda: read_status(job.folder)):.1f} s")
        line("  resumed, to the first picture", f"{first_picture(job):.1f} s")
        line("  the second half", f"{run():.1f} s")
        line("  status, at the end", f"{seconds(lambda: read_status(job.folder)):.1f} s")
        line("  submitted again, with nothing left", f"{run():.1f} s")
        line("  the table", f"{sum(file.stat().st_size for file in job.folder.rglob('*.parquet')) / 1e6:.1f} MB")


def open_inline(job: Job) -> Callable[[int], InlinePool]:
    def opened(_: int) -> InlinePool:
        pool = InlinePool(setup_for(job))
        pool.worker = Worker(pool.setup, "inline", TrivialModel())  # type: ignore[arg-type]
        return pool

    return opened


def first_picture(job: Job) -> float:
    started = time.perf_counter()
    found: list[float] = []

    class First(Silent):
        def image(self, request: ImageRequest, result: ImageResult) -> None:  # noqa: ARG002 - any will do
            found.append(time.perf_counter() - started)

    run_job(job, open_inline(job), First(), lambda: bool(found))
    return found[0]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def processor() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args(arguments)
    line("machine", f"{processor()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
    line("folder of the files (TMPDIR)", tempfile.gettempdir())
    if given.images:
        measure_efficiency(given.images)
    if given.rows:
        measure_large_manifest(given.rows)


if __name__ == "__main__":
    main(sys.argv[1:])
