"""What another busy program costs: wall time beside a busy loop and without it, in alternating rounds.

    python -m benchmarks.engine.busy_machine
        the embedded model, a worker at SD v1's size, and quantizing at that size
    python -m benchmarks.engine.busy_machine --only generate
        one of generate, worker and quantize
    python -m benchmarks.engine.busy_machine --before CHECKOUT
        also an earlier version, without the busy loop, right after each of our measurements
    python -m benchmarks.engine.busy_machine --spins 4000
        with another GOMP_SPINCOUNT than that of `threads.WAIT_POLICY`

Prints the median over the rounds of busy / alone, and of alone now / alone before. Models are written on the first run:
random weights, 0.6 GB for the worker, 4.3 GB for quantizing (--source FOLDER: a smaller model). Each measurement runs
in a process of its own; imports and loading count for quantizing only. Variables that decide how threads wait, and
OMP_NUM_THREADS, are removed from the environment first.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.models.random_sd_v1 import make_float_model, make_random_model
from tests.support.paths import ROOT
from tinysd_batch.threads import WAIT_POLICY, WAIT_POLICY_VARIABLES

ROUNDS = 9
SIZE_PX = 256
STEPS = 2
IMAGES = 4  # by the embedded model
BUSY_PROGRAM = "while True: pass"
GENERATE_PROGRAM = f"""
import sys, time
from tinysd_batch import TinySD
model = TinySD.from_pretrained("embedded", device="cpu")
model.generate("cat", 0)
started = time.monotonic()
for seed in range({IMAGES}):
    model.generate("red apple", seed)
print(time.monotonic() - started)
"""
# As in a worker: threads by `choose_cpu_workers`, precision `auto`; text encoding and decoding count.
WORKER_PROGRAM = f"""
import sys, time
from pathlib import Path
from tinysd_batch.job.state.open_job import resolve_settings
from tinysd_batch.job.workers.pool import choose_cpu_workers
from tinysd_batch.job.workers.worker import WorkerSetup, load_model
from tinysd_batch.model.checkpoint.info import read_model_info
info = read_model_info(sys.argv[1])
_, threads = choose_cpu_workers(1, 1, info.is_small)
here = Path()
setup = WorkerSetup.from_settings(
    resolve_settings(dict(device="cpu"), info), info, job_folder=here, scratch=here, threads=threads
)
model = load_model(setup)
options = dict(height={SIZE_PX}, width={SIZE_PX}, sampler="ddim", guidance_scale=7.5)
model.generate("a lake", 1, num_inference_steps=1, **options)
started = time.monotonic()
model.generate("a lake", 1, num_inference_steps={STEPS}, **options)
print(time.monotonic() - started)
"""


@contextmanager
def busy_loop() -> Iterator[None]:
    """Keep one core busy with an endless loop."""
    process = subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def clean_environment(checkout: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a user who sets none of the variables, with the package of `checkout`."""
    removed = {*WAIT_POLICY_VARIABLES, "OMP_NUM_THREADS"}
    variables = {name: value for name, value in os.environ.items() if name not in removed}
    if arguments.spins is not None and checkout == ROOT:
        variables |= {**WAIT_POLICY, "GOMP_SPINCOUNT": str(arguments.spins)}
    return {**variables, "PYTHONPATH": str(checkout)}


def run_timed_program(code: str, checkout: Path, arguments: argparse.Namespace) -> float:
    """Run a program that prints its seconds in its last line, and return them."""
    command = [sys.executable, "-c", code, str(arguments.model.resolve())]
    variables = clean_environment(checkout, arguments)
    done = subprocess.run(command, cwd=checkout, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_generate(checkout: Path, arguments: argparse.Namespace) -> float:
    return run_timed_program(GENERATE_PROGRAM, checkout, arguments)


def measure_worker(checkout: Path, arguments: argparse.Namespace) -> float:
    return run_timed_program(WORKER_PROGRAM, checkout, arguments)


def measure_quantize(checkout: Path, arguments: argparse.Namespace) -> float:
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tinysd_batch", "quantize", str(arguments.source.resolve()), str(out)]
    command += ["--level", "fast"]
    command += ["--no-samples"] if checkout == ROOT else []  # 0.1.0 generated none
    variables = clean_environment(checkout, arguments)
    started = time.monotonic()
    subprocess.run(command, cwd=checkout, env=variables, stdout=subprocess.DEVNULL, check=True)
    elapsed_s = time.monotonic() - started
    shutil.rmtree(out)
    return elapsed_s


MEASUREMENTS = {"generate": measure_generate, "worker": measure_worker, "quantize": measure_quantize}


def make_models(arguments: argparse.Namespace) -> None:
    """Write the models that are missing."""
    for name, folder, make in (
        ("worker", arguments.model, make_random_model),
        ("quantize", arguments.source, make_float_model),
    ):
        if name in arguments.only and not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)


def compare_busy_with_idle(name: str, arguments: argparse.Namespace) -> None:
    measure = MEASUREMENTS[name]
    alone: list[float] = []
    busy: list[float] = []
    before: list[float] = []
    for number in range(1, arguments.rounds + 1):
        alone.append(measure(ROOT, arguments))
        if arguments.before is not None:
            before.append(measure(arguments.before.resolve(), arguments))
        with busy_loop():
            busy.append(measure(ROOT, arguments))
        earlier = f", before {before[-1]:.2f} s" if before else ""
        print(f"{name:<10} round {number}: alone {alone[-1]:.2f} s{earlier}, busy {busy[-1]:.2f} s", flush=True)
    print_ratios(name, "busy / alone", busy, alone)
    if before:
        print_ratios(name, "now / before, alone", alone, before)


def print_ratios(name: str, label: str, numerators: list[float], denominators: list[float]) -> None:
    ratios = [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]
    print(
        f"{name:<10} {label:<20} median of {len(ratios)} rounds {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--spins", type=int)
    parser.add_argument("--model", type=Path, default=Path("outputs/random-sd-v1"))
    parser.add_argument("--source", type=Path, default=Path("outputs/random-sd-v1-float"))
    parser.add_argument("--out", type=Path, default=Path("outputs/random-sd-v1-busy"))
    arguments = parser.parse_args()
    arguments.only = arguments.only or list(MEASUREMENTS)
    make_models(arguments)
    print(f"load average before: {os.getloadavg()[0]:.2f}; figures are only valid on an otherwise idle machine")
    for name in arguments.only:
        compare_busy_with_idle(name, arguments)


if __name__ == "__main__":
    main()
