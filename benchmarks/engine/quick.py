"""Measure what first light promises, on the machine at hand, and print a table.

    python benchmarks/engine/quick.py

- embedded model: seconds per image, in this process, batches of 1 and of 8, with one thread and with all
- cold start: from the command to the first picture on disk, in process and with Ray
- job layer: milliseconds per image on top of a generator that does nothing but make a small picture
- unpacking: 2-bit weights to float32, by our kernel, FBGEMM and plain torch, into a reused buffer and into fresh memory

Figures are medians of alternating runs.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.support.stub_model import SilentProgress, StubModel
from tinysd_batch import TinySD
from tinysd_batch.config import Settings
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.model.packed.dequantize import dequantize, has_working_kernels
from tinysd_batch.model.packed.fbgemm import dequantize_by_rows, dequantize_rows_torch
from tinysd_batch.quantize.solve.affine import quantize_matrix
from tinysd_batch.threads import count_usable_cores

ROUNDS = 5


def time_call_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def print_measurement(what: str, value: str) -> None:
    print(f"{what:<58} {value}", flush=True)


def measure_model() -> None:
    model = TinySD.from_pretrained("embedded", device="cpu")
    model.generate("cat", 0)
    times: dict[int, list[float]] = {1: [], count_usable_cores(): []}
    for _ in range(ROUNDS):
        for threads, taken in times.items():
            torch.set_num_threads(threads)
            taken.append(time_call_s(lambda: model.generate("red apple", 1)))
    torch.set_num_threads(1)  # as a worker does with a model this small
    one, many = statistics.median(times[1]), statistics.median(times[count_usable_cores()])
    eight = statistics.median(
        time_call_s(lambda: model.generate(["red apple"] * 8, list(range(8)))) for _ in range(ROUNDS)
    )
    print_measurement("embedded model, one image, with its own steps and scale", f"{one:.2f} s")
    print_measurement(
        f"  the same with {count_usable_cores()} threads", f"{many:.2f} s   ratio to one thread {many / one:.2f}"
    )
    print_measurement(
        "embedded model, per image in a batch of 8", f"{eight / 8:.2f} s   ratio to one {eight / 8 / one:.2f}"
    )


def measure_first_image_s(*options: str) -> float:
    """Seconds from the command to a picture on disk."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "m.csv").write_text("prompt\nred apple\n")
        command = [sys.executable, "-m", "tinysd_batch", "submit", "m.csv", "-o", "job", *options]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        while not list(Path(folder).glob("job/images/00000/seed_*.png")):
            assert process.poll() in (None, 0), "the run failed"
            time.sleep(0.005)
        elapsed = time.perf_counter() - started
        process.wait()
    return elapsed


def measure_cold_start() -> None:
    for name, options in (("in process (--inline)", ["--inline"]), ("with Ray", [])):
        median = statistics.median(measure_first_image_s(*options) for _ in range(3))
        print_measurement(f"cold start to the first picture, {name}", f"{median:.1f} s")


def measure_job_layer(images: int = 1000) -> None:
    """Planning, encoding, publishing with fsync, journal and table, on the disk of the temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "m.csv"
        manifest.write_text("prompt\n" + "red apple\n" * images)
        job = open_job(manifest, Path(folder) / "job", Settings())
        setup = WorkerSetup(
            job.folder, job.scratch, job.model.path, job.model.name, job.model.digest, "cpu", "auto", None
        )
        pool = InlinePool(setup)
        pool.worker = Worker(setup, "trivial", StubModel())  # type: ignore[arg-type]
        elapsed = time_call_s(lambda: run_job(job, lambda _: pool, SilentProgress(), lambda: False))
        payloads = [path.read_bytes() for path in (job.folder / "images").rglob("*.png")]
        writes = time_call_s(lambda: write_synced(Path(folder), payloads))
    print_measurement("job layer, per image (trivial generator)", f"{1000 * elapsed / images:.2f} ms")
    print_measurement("  of which a bare synced write of the same bytes takes", f"{1000 * writes / images:.2f} ms")


def write_synced(folder: Path, payloads: Sequence[bytes]) -> None:
    for number, data in enumerate(payloads):
        with (folder / f"w{number}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def measure_dequantize() -> None:
    """One 1280 x 11520 matrix, SD v1's common 3x3 convolution, one thread."""
    weight = quantize_matrix(torch.randn(1280, 11520), 64)
    out = torch.empty(weight.shape)
    ways: dict[str, Callable[[], object]] = {
        "FBGEMM": lambda: dequantize_by_rows(weight, out),
        "plain torch": lambda: dequantize_by_rows(weight, out, dequantize_rows_torch),
    }
    if has_working_kernels(out.device):
        ways["our kernel"] = lambda: dequantize(weight, out)
        ways["our kernel, into fresh memory"] = lambda: dequantize(weight, torch.empty(weight.shape))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2 * ROUNDS + 1):
        for name, way in ways.items():
            times[name].append(time_call_s(way))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print_measurement(f"unpacking to float32, one thread, {name}", f"{1280 * 11520 / value / 1e9:.2f} Gweight/s")
        print_measurement("  takes, times FBGEMM", f"{value / medians['FBGEMM']:.2f}")


def read_cpu_name() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    print_measurement("machine", f"{read_cpu_name()}, {count_usable_cores()} cores, torch {torch.__version__}")
    measure_model()
    measure_cold_start()
    measure_job_layer()
    measure_dequantize()
