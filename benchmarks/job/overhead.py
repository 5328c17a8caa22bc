"""Measure what the job layer adds to the images themselves, beside Ray Data on the same work in the same run.

    python -m benchmarks.job.overhead [--images 1000] [--rows 100000]

An image here takes 50 ms, its encoding and its synced file included: the stand-in for the model sleeps for what these
leave of it. Measured from the first chunk handed out to the last durable row; starting and ending Ray is apart. The
ideal is that no worker ever waits: 50 ms for each of its images, and nothing else.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.stub_model import STUB_IMAGE_PX, SilentProgress, StubModel, StubRayPool, StubWorkerProcess
from tinysd_batch.config import Settings
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.ray_workers.cluster import start_ray
from tinysd_batch.job.ray_workers.result_batches import ResultBatch
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch
from tinysd_batch.report.status import read_status
from tinysd_batch.threads import count_usable_cores

IMAGE_S = 0.05
WORKERS = 2
CHUNK_LOG_PREFIX = "chunks-"  # files in the job folder, one of each worker


class PacedProcess(StubWorkerProcess):
    """Takes `IMAGE_S` for an image and its file together, and writes down where a chunk's time went."""

    inside = 0.0

    def generate_batch(self, batch: MicroBatch) -> list[ImageResult]:
        start = time.perf_counter()
        results = super().generate_batch(batch)
        time.sleep(max(0.0, start + IMAGE_S * len(batch.images) - time.perf_counter()))
        self.inside += time.perf_counter() - start
        return results

    def run_chunk(self, batches: Sequence[MicroBatch]) -> Iterator[ResultBatch]:
        start, read_cpu_name, self.inside = time.perf_counter(), time.process_time(), 0.0
        yield from super().run_chunk(batches)
        told = (start, time.perf_counter(), len(batches), self.inside, time.process_time() - read_cpu_name)
        with (self.setup.job_folder / f"{CHUNK_LOG_PREFIX}{self.name}").open("a") as file:
            file.write(json.dumps(told) + "\n")


class PacedPool(StubRayPool):
    """Notes when the first chunk was handed out, which is once all workers are ready."""

    worker_class = PacedProcess
    first_chunk = 0.0

    def idle_workers(self) -> list[str]:
        return super().idle_workers() if all(slot.is_ready or slot.consecutive_losses for slot in self.slots) else []

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        PacedPool.first_chunk = PacedPool.first_chunk or time.perf_counter()
        super().submit(worker, chunk)


class DurableClock(SilentProgress):
    """Notes when rows were last made durable."""

    last_durable = 0.0

    def report_flush(self) -> None:
        self.last_durable = time.perf_counter()


def print_measurement(what: str, value: str) -> None:
    print(f"{what:<72} {value}", flush=True)


def make_job(folder: Path, images: int) -> Job:
    manifest = folder / "m.csv"
    manifest.write_text("prompt\n" + "".join(f"p{number}\n" for number in range(images)))
    return reopen_job(manifest, folder / "job")


def reopen_job(manifest: Path, folder: Path) -> Job:
    return open_job(manifest, folder, Settings(height=STUB_IMAGE_PX, width=STUB_IMAGE_PX, seed=1))


def make_worker_setup(job: Job) -> WorkerSetup:
    return WorkerSetup.from_settings(
        job.settings, job.model, job_folder=job.folder, scratch=job.scratch, stop_file=job.stop_file
    )


@dataclass(frozen=True, slots=True)
class TimeBreakdown:
    """Where the time went, in seconds; those of workers are means of all workers."""

    whole: float  # from the first chunk handed out to the last durable row
    driver: float  # processor, Ray's start and end included
    worker: float = 0.0  # processor, pictures and files included
    chunks: float = 0.0  # how many, of a worker
    beyond: float = 0.0  # what images took beyond their 50 ms: sleep that was too long, files that were late
    telling: float = 0.0  # within chunks and between images: results on their way
    waiting: float = 0.0  # between chunks

    @classmethod
    def read(cls, folder: Path, whole: float, driver: float) -> "TimeBreakdown":
        workers = [
            [json.loads(text) for text in path.read_text().splitlines()] for path in folder.glob(f"{CHUNK_LOG_PREFIX}*")
        ]
        chunks = [chunk for worker in workers for chunk in worker]
        within, inside = sum(chunk[1] - chunk[0] for chunk in chunks), sum(chunk[3] for chunk in chunks)
        spans = sum(worker[-1][1] - worker[0][0] for worker in workers)
        sums = {
            "worker": sum(chunk[4] for chunk in chunks),
            "chunks": len(chunks),
            "beyond": inside - IMAGE_S * sum(chunk[2] for chunk in chunks),
            "telling": within - inside,
            "waiting": spans - within,
        }
        return cls(whole, driver, **{name: value / WORKERS for name, value in sums.items()})


def run_paced(images: int) -> TimeBreakdown:
    processor_s = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), images)
        clock = DurableClock()
        PacedPool.first_chunk = 0.0
        summary = run_job(job, lambda _: PacedPool(make_worker_setup(job), WORKERS), clock, lambda: False)
        assert summary.counts["ok"] == images  # type: ignore[index]
        whole, driver = clock.last_durable - PacedPool.first_chunk, time.process_time() - processor_s
        return TimeBreakdown.read(job.folder, whole, driver)


def run_ray_data(images: int) -> float:
    """The same images by `map_batches` on as many actors: first dispatch to the last row written as Parquet.

    Raises ImportError where pandas is missing, which Ray Data needs and we do not.
    """
    import ray.data

    session = start_ray({})
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), images)
        setup = replace(make_worker_setup(job), model_name="trivial:0.0")
        job.scratch.mkdir(parents=True)

        class Draw:
            def __init__(self) -> None:
                self.worker = PacedProcess(setup, "data")

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                made = [self.worker.generate_batch(make_single_batch(job, int(number)))[0] for number in rows["id"]]
                return {"index": [row.index for row in made], "sha256": [row.sha256 for row in made]}

        started = time.perf_counter()  # half a core for each actor leaves one for reading and writing
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.range(images, override_num_blocks=max(WORKERS, images // 16)).map_batches(
            Draw, batch_size=16, compute=ray.data.ActorPoolStrategy(size=WORKERS), num_cpus=0.5
        ).write_parquet(folder + "/rows")
        elapsed = time.perf_counter() - started
        assert len(list(job.folder.rglob("seed_*"))) == images
    session.stop()
    return elapsed


def make_single_batch(job: Job, number: int) -> MicroBatch:
    from tinysd_batch.job.plan.batches import make_probe_request

    image: ImageRequest = replace(
        make_probe_request(job.settings), index=number + 1, seed=number, file_name=f"images/00000/seed_{number}.png"
    )
    return MicroBatch((image,), frozenset({image.index}))


def measure_efficiency(images: int) -> None:
    ideal = images * IMAGE_S / WORKERS
    first = run_paced(images)
    try:
        theirs = f"{(took := run_ray_data(images)):.2f} s, {ideal / took:.1%}"
    except ImportError as error:
        theirs = f"not measured: {error}"
    again = run_paced(images)
    print_measurement(f"{images:,} images of {1000 * IMAGE_S:.0f} ms on {WORKERS} workers, at best", f"{ideal:.2f} s")
    print_measurement("  Ray Data map_batches, 16 at a time, actors' start included", theirs)
    for times in (first, again):
        print_breakdown(times, images, ideal)


def print_breakdown(times: TimeBreakdown, images: int, ideal: float) -> None:
    print_measurement(
        "  tinysd-batch, first dispatch to last durable row", f"{times.whole:.2f} s, {ideal / times.whole:.1%}"
    )
    each = images / WORKERS
    print_measurement("    beyond 50 ms, per image", f"{1000 * (times.whole - ideal) / images:.2f} ms")
    print_measurement("    beyond 50 ms, per image of a worker", f"{1000 * (times.whole - ideal) / each:.2f} ms")
    print_measurement(
        "      of which pictures that took longer, by sleep or file", f"{1000 * times.beyond / each:.2f} ms"
    )
    print_measurement("      results on their way", f"{1000 * times.telling / each:.2f} ms")
    print_measurement(
        f"      waiting for the next of {times.chunks:.0f} chunks", f"{1000 * times.waiting / each:.2f} ms"
    )
    rest = times.whole - ideal - times.beyond - times.telling - times.waiting
    print_measurement("      before the first chunk and after the last", f"{1000 * rest / each:.2f} ms")
    print_measurement(
        "    processor time per image: worker, its picture and file included", f"{1000 * times.worker / each:.2f} ms"
    )
    print_measurement(
        "    processor time per image: driver, Ray's start and end included", f"{1000 * times.driver / images:.2f} ms"
    )


def measure_large_manifest(rows: int) -> None:
    """Planning, running, status, resuming and finding nothing to do, in this process, with no time for the model."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), rows)

        def run(stop: Callable[[], bool] = lambda: False, limit: int | None = None) -> float:
            started = time.perf_counter()
            again = reopen_job(job.manifest, job.folder)
            run_job(again, open_inline(again), SilentProgress(), stop, limit)
            return time.perf_counter() - started

        print_measurement(f"{rows:,} rows: planned and nothing drawn", f"{run(lambda: True):.1f} s")
        processor_s = time.process_time()
        half = run(limit=rows // 2)
        each, busy = 1000 * half / (rows / 2), 1000 * (time.process_time() - processor_s) / (rows / 2)
        print_measurement("  the first half drawn, each picture synced", f"{half:.1f} s, {each:.2f} ms an image")
        print_measurement("    of which processor time; the rest waits for the disk", f"{busy:.2f} ms an image")
        print_measurement("  status, in the middle", f"{time_call_s(lambda: read_status(job.folder)):.1f} s")
        print_measurement("  resumed, to the first picture", f"{measure_first_image_s(job):.1f} s")
        print_measurement("  the second half", f"{run():.1f} s")
        print_measurement("  status, at the end", f"{time_call_s(lambda: read_status(job.folder)):.1f} s")
        print_measurement("  submitted again, with nothing left", f"{run():.1f} s")
        print_measurement(
            "  the table", f"{sum(file.stat().st_size for file in job.folder.rglob('*.parquet')) / 1e6:.1f} MB"
        )


def open_inline(job: Job) -> Callable[[int], InlinePool]:
    def opened(_: int) -> InlinePool:
        pool = InlinePool(make_worker_setup(job))
        pool.worker = Worker(pool.setup, "inline", StubModel())  # type: ignore[arg-type]
        return pool

    return opened


def measure_first_image_s(job: Job) -> float:
    started = time.perf_counter()
    found: list[float] = []

    class First(SilentProgress):
        def report_image(self, request: ImageRequest, result: ImageResult) -> None:  # noqa: ARG002 - any will do
            found.append(time.perf_counter() - started)

    again = reopen_job(job.manifest, job.folder)
    run_job(again, open_inline(again), First(), lambda: bool(found))
    return found[0]


def time_call_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_cpu_name() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args(arguments)
    print_measurement("machine", f"{read_cpu_name()}, {count_usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
    print_measurement("folder of the files (TMPDIR)", tempfile.gettempdir())
    if given.images:
        measure_efficiency(given.images)
    if given.rows:
        measure_large_manifest(given.rows)


if __name__ == "__main__":
    main(sys.argv[1:])
