"""What the job layer adds to the time of the images themselves, beside Ray Data with the same work in the same run.

    python -m benchmarks.job.overhead [--images 1000] [--rows 100000]

An image takes 50 ms here, including its encoding and its synced file: the stub model sleeps for the rest. The time is
measured from the first chunk to the last durable row; starting and stopping Ray is not part of it. Ideally no worker
ever waits, and images take 50 ms each and nothing else.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.models.stub_model import STUB_IMAGE_PX, SilentProgress, StubModel, StubRayPool, StubWorkerProcess
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
CHUNK_LOG_PREFIX = "chunks-"  # of files in the job folder, one for each worker


class PacedProcess(StubWorkerProcess):
    """Takes `IMAGE_S` for an image and its file together, and logs how the time of a chunk was spent."""

    generating_s = 0.0

    def generate_batch(self, batch: MicroBatch) -> list[ImageResult]:
        start = time.perf_counter()
        results = super().generate_batch(batch)
        time.sleep(max(0.0, start + IMAGE_S * len(batch.images) - time.perf_counter()))
        self.generating_s += time.perf_counter() - start
        return results

    def run_chunk(self, batches: Sequence[MicroBatch]) -> Iterator[ResultBatch]:
        start, cpu_start, self.generating_s = time.perf_counter(), time.process_time(), 0.0
        yield from super().run_chunk(batches)
        cpu_s = time.process_time() - cpu_start
        entry = (start, time.perf_counter(), len(batches), self.generating_s, cpu_s)
        with (self.setup.job_folder / f"{CHUNK_LOG_PREFIX}{self.name.replace('/', '-')}").open("a") as file:
            file.write(json.dumps(entry) + "\n")


class PacedPool(StubRayPool):
    """Records when the first chunk was sent, and sends none before all workers are ready."""

    worker_class = PacedProcess
    first_chunk = 0.0

    def idle_workers(self) -> list[str]:
        return super().idle_workers() if all(slot.is_ready or slot.consecutive_losses for slot in self.slots) else []

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        PacedPool.first_chunk = PacedPool.first_chunk or time.perf_counter()
        super().submit(worker, chunk)


class DurableClock(SilentProgress):
    """Records when rows were last made durable."""

    last_durable = 0.0

    def report_flush(self) -> None:
        self.last_durable = time.perf_counter()


def print_measurement(label: str, value: str) -> None:
    print(f"{label:<72} {value}", flush=True)


def make_job(folder: Path, images: int) -> Job:
    manifest = folder / "m.csv"
    manifest.write_text("prompt\n" + "".join(f"p{number}\n" for number in range(images)))
    return reopen_job(manifest, folder / "job")


def reopen_job(manifest: Path, folder: Path) -> Job:
    return open_job(manifest, folder, {"height": STUB_IMAGE_PX, "width": STUB_IMAGE_PX, "seed": 1})


def make_worker_setup(job: Job) -> WorkerSetup:
    return WorkerSetup.from_settings(
        job.settings, job.model, job_folder=job.folder, scratch=job.scratch, stop_file=job.stop_file
    )


@dataclass(frozen=True, slots=True)
class TimeBreakdown:
    """How the time of a run was spent; values of workers are means over all workers."""

    total_s: float  # from the first chunk to the last durable row
    driver_cpu_s: float  # including starting and stopping Ray
    worker_cpu_s: float = 0.0  # including images and files
    chunks: float = 0.0  # of one worker
    excess_s: float = 0.0  # beyond 50 ms for each image: sleeps that were too long, files that were late
    sending_s: float = 0.0  # within chunks but between images: sending results
    waiting_s: float = 0.0  # between chunks

    @classmethod
    def read(cls, folder: Path, total_s: float, driver_cpu_s: float) -> "TimeBreakdown":
        """Read the chunk logs of all workers."""
        workers = [
            [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob(f"{CHUNK_LOG_PREFIX}*")
        ]
        chunks = [chunk for worker in workers for chunk in worker]
        chunk_s, generating_s = sum(chunk[1] - chunk[0] for chunk in chunks), sum(chunk[3] for chunk in chunks)
        span_s = sum(worker[-1][1] - worker[0][0] for worker in workers)
        sums = {
            "worker_cpu_s": sum(chunk[4] for chunk in chunks),
            "chunks": len(chunks),
            "excess_s": generating_s - IMAGE_S * sum(chunk[2] for chunk in chunks),
            "sending_s": chunk_s - generating_s,
            "waiting_s": span_s - chunk_s,
        }
        return cls(total_s, driver_cpu_s, **{name: value / WORKERS for name, value in sums.items()})


def run_paced(images: int) -> TimeBreakdown:
    """Run a job with the paced stub model in Ray workers."""
    cpu_start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), images)
        clock = DurableClock()
        PacedPool.first_chunk = 0.0
        summary = run_job(job, lambda _: PacedPool(make_worker_setup(job), WORKERS), clock, lambda: False)
        assert summary.counts["ok"] == images  # type: ignore[index]
        total_s, driver_cpu_s = clock.last_durable - PacedPool.first_chunk, time.process_time() - cpu_start
        return TimeBreakdown.read(job.folder, total_s, driver_cpu_s)


def run_ray_data(images: int) -> float:
    """Generate the same images by `map_batches` with as many actors.

    Returns:
        Seconds from the first dispatch to the last row written as Parquet.

    Raises:
        ImportError: pandas is missing, which Ray Data needs and this package does not.
    """
    import ray.data

    session = start_ray({})
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), images)
        setup = replace(make_worker_setup(job), model_name="trivial:0.0")
        job.scratch.mkdir(parents=True)

        class GenerateImages:
            def __init__(self) -> None:
                self.worker = PacedProcess(setup, "data")

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                results = [self.worker.generate_batch(make_single_batch(job, int(number)))[0] for number in rows["id"]]
                return {"index": [result.index for result in results], "sha256": [result.sha256 for result in results]}

        started = time.perf_counter()  # half a core for each actor leaves one for reading and writing
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.range(images, override_num_blocks=max(WORKERS, images // 16)).map_batches(
            GenerateImages, batch_size=16, compute=ray.data.ActorPoolStrategy(size=WORKERS), num_cpus=0.5
        ).write_parquet(folder + "/rows")
        elapsed_s = time.perf_counter() - started
        assert len(list(job.folder.rglob("seed_*"))) == images
    session.stop()
    return elapsed_s


def make_single_batch(job: Job, number: int) -> MicroBatch:
    from tinysd_batch.job.plan.batches import make_probe_request

    image: ImageRequest = replace(
        make_probe_request(job.settings), index=number + 1, seed=number, file_name=f"images/00000/seed_{number}.png"
    )
    return MicroBatch((image,), frozenset({image.index}))


def measure_efficiency(images: int) -> None:
    """Print our run, Ray Data's, and ours again."""
    ideal_s = images * IMAGE_S / WORKERS
    first = run_paced(images)
    try:
        ray_data_s = run_ray_data(images)
        ray_data = f"{ray_data_s:.2f} s, {ideal_s / ray_data_s:.1%}"
    except ImportError as error:
        ray_data = f"not measured: {error}"
    second = run_paced(images)
    print_measurement(f"{images:,} images of {1000 * IMAGE_S:.0f} ms on {WORKERS} workers, ideally", f"{ideal_s:.2f} s")
    print_measurement("  Ray Data map_batches, 16 at a time, including the start of actors", ray_data)
    for times in (first, second):
        print_breakdown(times, images, ideal_s)


def print_breakdown(times: TimeBreakdown, images: int, ideal_s: float) -> None:
    def print_ms(label: str, seconds: float, count: float) -> None:
        print_measurement(label, f"{1000 * seconds / count:.2f} ms")

    print_measurement(
        "  tinysd-batch, first dispatch to last durable row", f"{times.total_s:.2f} s, {ideal_s / times.total_s:.1%}"
    )
    per_worker = images / WORKERS
    other_s = times.total_s - ideal_s - times.excess_s - times.sending_s - times.waiting_s
    print_ms("    beyond 50 ms, per image", times.total_s - ideal_s, images)
    print_ms("    beyond 50 ms, per image of a worker", times.total_s - ideal_s, per_worker)
    print_ms("      images that took longer, because of sleep or file", times.excess_s, per_worker)
    print_ms("      sending results", times.sending_s, per_worker)
    print_ms(f"      waiting for the next of {times.chunks:.0f} chunks", times.waiting_s, per_worker)
    print_ms("      before the first chunk and after the last", other_s, per_worker)
    print_ms("    CPU time per image: worker, including image and file", times.worker_cpu_s, per_worker)
    print_ms("    CPU time per image: driver, including Ray's start and stop", times.driver_cpu_s, images)


def measure_large_manifest(rows: int) -> None:
    """Measure planning, running, status, resuming and a complete job, in this process, with a stub model."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), rows)

        def run(stop: Callable[[], bool] = lambda: False, limit: int | None = None) -> float:
            started = time.perf_counter()
            reopened = reopen_job(job.manifest, job.folder)
            run_job(reopened, open_inline(reopened), SilentProgress(), stop, limit)
            return time.perf_counter() - started

        print_measurement(f"{rows:,} rows: planned, nothing generated", f"{run(lambda: True):.1f} s")
        cpu_start = time.process_time()
        half_s = run(limit=rows // 2)
        image_ms, cpu_ms = 1000 * half_s / (rows / 2), 1000 * (time.process_time() - cpu_start) / (rows / 2)
        print_measurement("  first half, each image synced", f"{half_s:.1f} s, {image_ms:.2f} ms per image")
        print_measurement("    CPU time of it; the rest waits for the disk", f"{cpu_ms:.2f} ms per image")
        print_measurement("  status, half-way", f"{time_call_s(lambda: read_status(job.folder)):.1f} s")
        print_measurement("  resumed, to the first image", f"{measure_first_image_s(job):.1f} s")
        print_measurement("  second half", f"{run():.1f} s")
        print_measurement("  status, at the end", f"{time_call_s(lambda: read_status(job.folder)):.1f} s")
        print_measurement("  submitted again, nothing to do", f"{run():.1f} s")
        table_bytes = sum(file.stat().st_size for file in job.folder.rglob("*.parquet"))
        print_measurement("  results table", f"{table_bytes / 1e6:.1f} MB")


def open_inline(job: Job) -> Callable[[int], InlinePool]:
    def open_pool(_: int) -> InlinePool:
        pool = InlinePool(make_worker_setup(job))
        pool.worker = Worker(pool.setup, "inline", StubModel())  # type: ignore[arg-type]
        return pool

    return open_pool


def measure_first_image_s(job: Job) -> float:
    started = time.perf_counter()
    durations: list[float] = []

    class FirstImageClock(SilentProgress):
        def report_image(self, request: ImageRequest, result: ImageResult) -> None:  # noqa: ARG002 - any image counts
            durations.append(time.perf_counter() - started)

    reopened = reopen_job(job.manifest, job.folder)
    run_job(reopened, open_inline(reopened), FirstImageClock(), lambda: bool(durations))
    return durations[0]


def time_call_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    print_measurement("machine", f"{read_cpu_name()}, {count_usable_cores()} cores, load {os.getloadavg()[0]:.1f}")
    print_measurement("folder of the files (TMPDIR)", tempfile.gettempdir())
    if arguments.images:
        measure_efficiency(arguments.images)
    if arguments.rows:
        measure_large_manifest(arguments.rows)


if __name__ == "__main__":
    main()
