"""Measure the most important figures on this machine in a few minutes, and print a table.

    python -m benchmarks.engine.quick

- embedded model: seconds per image in this process, one at a time and in a micro-batch of 8, with one thread and all
- cold start: from the command to the first image on disk, in process and with Ray
- job layer: milliseconds per image, beyond a stub model that takes no time
- dequantizing: 2-bit weights to float32 by our kernel, FBGEMM and plain torch, into a reused buffer and into new memory

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

from tests.support.models.stub_model import SilentProgress, StubModel
from tinysd_batch import TinySD
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.job.workers.inline_pool import InlinePool
from tinysd_batch.job.workers.worker import Worker, WorkerSetup
from tinysd_batch.model.packed.dequantize import dequantize, has_working_kernels
from tinysd_batch.model.packed.fbgemm import dequantize_by_rows, dequantize_rows_torch
from tinysd_batch.quantize.solve.affine import quantize_matrix
from tinysd_batch.threads import count_usable_cores

ROUNDS = 5
CONV_SHAPE = (1280, 11520)  # the matrix of SD v1's most common 3x3 convolution


def time_call_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def print_measurement(label: str, value: str) -> None:
    print(f"{label:<58} {value}", flush=True)


def measure_model() -> None:
    model = TinySD.from_pretrained("embedded", device="cpu")
    model.generate("cat", 0)
    cores = count_usable_cores()
    durations: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(ROUNDS):
        for threads in durations:
            torch.set_num_threads(threads)
            durations[threads].append(time_call_s(lambda: model.generate("red apple", 1)))
    torch.set_num_threads(1)  # as in a worker with a model this small
    one_thread, all_threads = statistics.median(durations[1]), statistics.median(durations[cores])
    batch_of_8 = statistics.median(
        time_call_s(lambda: model.generate(["red apple"] * 8, list(range(8)))) for _ in range(ROUNDS)
    )
    print_measurement("embedded model, one image, default steps and scale", f"{one_thread:.2f} s")
    print_measurement(
        f"  the same with {cores} threads", f"{all_threads:.2f} s   ratio to one thread {all_threads / one_thread:.2f}"
    )
    print_measurement(
        "embedded model, per image in a batch of 8",
        f"{batch_of_8 / 8:.2f} s   ratio to one {batch_of_8 / 8 / one_thread:.2f}",
    )


def measure_first_image_s(*options: str) -> float:
    """Return the seconds from the command to an image on disk."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "m.csv").write_text("prompt\nred apple\n")
        command = [sys.executable, "-m", "tinysd_batch", "submit", "m.csv", "-o", "job", *options]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        while not list(Path(folder).glob("job/images/00000/seed_*.png")):
            assert process.poll() in (None, 0), "the run failed"
            time.sleep(0.005)
        elapsed_s = time.perf_counter() - started
        process.wait()
    return elapsed_s


def measure_cold_start() -> None:
    for name, options in (("in process (--inline)", ["--inline"]), ("with Ray", [])):
        median = statistics.median(measure_first_image_s(*options) for _ in range(3))
        print_measurement(f"cold start to the first image, {name}", f"{median:.1f} s")


def measure_job_layer(images: int = 1000) -> None:
    """Measure planning, encoding, publishing with fsync, journal and table, on the disk of the temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "m.csv"
        manifest.write_text("prompt\n" + "red apple\n" * images)
        job = open_job(manifest, Path(folder) / "job", {})
        setup = WorkerSetup.from_settings(job.settings, job.model, job_folder=job.folder, scratch=job.scratch)
        pool = InlinePool(setup)
        pool.worker = Worker(setup, "trivial", StubModel())  # type: ignore[arg-type]
        elapsed_s = time_call_s(lambda: run_job(job, lambda _: pool, SilentProgress(), lambda: False))
        files = [path.read_bytes() for path in (job.folder / "images").rglob("*.png")]
        write_s = time_call_s(lambda: write_synced(Path(folder), files))
    print_measurement("job layer, per image (stub model)", f"{1000 * elapsed_s / images:.2f} ms")
    print_measurement("  of which a bare synced write of the same bytes takes", f"{1000 * write_s / images:.2f} ms")


def write_synced(folder: Path, files: Sequence[bytes]) -> None:
    for number, data in enumerate(files):
        with (folder / f"w{number}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def measure_dequantize() -> None:
    """Measure dequantizing one large matrix with one thread."""
    weight = quantize_matrix(torch.randn(*CONV_SHAPE), 64)
    out = torch.empty(weight.shape)
    variants: dict[str, Callable[[], object]] = {
        "FBGEMM": lambda: dequantize_by_rows(weight, out),
        "plain torch": lambda: dequantize_by_rows(weight, out, dequantize_rows_torch),
    }
    if has_working_kernels(out.device):
        variants["our kernel"] = lambda: dequantize(weight, out)
        variants["our kernel, into new memory"] = lambda: dequantize(weight, torch.empty(weight.shape))
    durations: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(2 * ROUNDS + 1):
        for name, run in variants.items():
            durations[name].append(time_call_s(run))
    medians = {name: statistics.median(values) for name, values in durations.items()}
    for name, median in medians.items():
        rate = out.numel() / median / 1e9
        print_measurement(f"dequantizing to float32, one thread, {name}", f"{rate:.2f} Gweight/s")
        print_measurement("  duration over that of FBGEMM", f"{median / medians['FBGEMM']:.2f}")


def read_cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    print_measurement("machine", f"{read_cpu_name()}, {count_usable_cores()} cores, torch {torch.__version__}")
    measure_model()
    measure_cold_start()
    measure_job_layer()
    measure_dequantize()
