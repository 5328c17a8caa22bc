"""What another busy program costs: wall seconds beside a single-threaded loop and alone, in rounds that alternate.

    python -m benchmarks.engine.busy_machine  the embedded model, a worker at SD v1's size, quantizing at that size
    python -m benchmarks.engine.busy_machine --only generate    one of generate, worker and quantize
    python -m benchmarks.engine.busy_machine --before CHECKOUT
        alone, also by an earlier version, right after each measurement of ours
    python -m benchmarks.engine.busy_machine --spins 4000  with another GOMP_SPINCOUNT than the one of `threads.WAIT_POLICY`

Prints the median of busy / alone over the rounds, and of alone now / alone before. Models are made on the first run:
random weights, 0.6 GB for the worker, 4.3 GB for quantizing (--source FOLDER: a smaller model). Each measurement is a
process of its own, in which importing and loading do not count, but for quantizing. Variables that choose how threads
wait, and OMP_NUM_THREADS, are taken out of the environment first.
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
# As a worker does: threads by `cpu_workers`, the precision that `auto` chooses, text and decoding included.
WORKER_PROGRAM = f"""
import sys, time
from pathlib import Path
from tinysd_batch.job.workers.inline_pool import cpu_workers
from tinysd_batch.job.workers.worker import WorkerSetup, load_model
from tinysd_batch.model.checkpoint.info import read_model_info
info = read_model_info(sys.argv[1])
_, threads = cpu_workers(1, 1, info.is_small)
here = Path()
setup = WorkerSetup(here, here, info.path, info.name, info.digest, "cpu", "auto", threads=threads)
model = load_model(setup)
how = dict(height={SIZE_PX}, width={SIZE_PX}, sampler="ddim", guidance_scale=7.5)
model.generate("a lake", 1, num_inference_steps=1, **how)
started = time.monotonic()
model.generate("a lake", 1, num_inference_steps={STEPS}, **how)
print(time.monotonic() - started)
"""


@contextmanager
def busy_loop() -> Iterator[None]:
    """One core is busy meanwhile, as far as others let it."""
    process = subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def clean_environment(checkout: Path, given: argparse.Namespace) -> dict[str, str]:
    """As a user has it who sets nothing, with the package of that checkout."""
    ours = {
        name: value for name, value in os.environ.items() if name not in {*WAIT_POLICY_VARIABLES, "OMP_NUM_THREADS"}
    }
    if given.spins is not None and checkout == ROOT:
        ours |= {**WAIT_POLICY, "GOMP_SPINCOUNT": str(given.spins)}
    return {**ours, "PYTHONPATH": str(checkout)}


def run_timed_program(code: str, checkout: Path, given: argparse.Namespace) -> float:
    words = [sys.executable, "-c", code, str(given.model.resolve())]
    done = subprocess.run(
        words, cwd=checkout, env=clean_environment(checkout, given), stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def measure_generate(checkout: Path, given: argparse.Namespace) -> float:
    return run_timed_program(GENERATE_PROGRAM, checkout, given)


def measure_worker(checkout: Path, given: argparse.Namespace) -> float:
    return run_timed_program(WORKER_PROGRAM, checkout, given)


def measure_quantize(checkout: Path, given: argparse.Namespace) -> float:
    out = given.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "tinysd_batch", "quantize", str(given.source.resolve()), str(out), "--level", "fast"]
    words += ["--no-samples"] if checkout == ROOT else []  # 0.1.0 generated none
    started = time.monotonic()
    subprocess.run(words, cwd=checkout, env=clean_environment(checkout, given), stdout=subprocess.DEVNULL, check=True)
    took = time.monotonic() - started
    shutil.rmtree(out)
    return took


MEASUREMENTS = {"generate": measure_generate, "worker": measure_worker, "quantize": measure_quantize}


def make_models(given: argparse.Namespace) -> None:
    from tests.support.random_sd_v1 import make_float_model, make_random_model

    for name, folder, make in (
        ("worker", given.model, make_random_model),
        ("quantize", given.source, make_float_model),
    ):
        if name in given.only and not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)


def compare_busy_with_idle(name: str, given: argparse.Namespace) -> None:
    measure = MEASUREMENTS[name]
    alone: list[float] = []
    busy: list[float] = []
    before: list[float] = []
    for number in range(1, given.rounds + 1):
        alone.append(measure(ROOT, given))
        if given.before is not None:
            before.append(measure(given.before.resolve(), given))
        with busy_loop():
            busy.append(measure(ROOT, given))
        earlier = f", before {before[-1]:.2f} s" if before else ""
        print(f"{name:<10} round {number}: alone {alone[-1]:.2f} s{earlier}, busy {busy[-1]:.2f} s", flush=True)
    print_ratios(name, "busy / alone", busy, alone)
    if before:
        print_ratios(name, "now / before, alone", alone, before)


def print_ratios(name: str, what: str, ones: list[float], others: list[float]) -> None:
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    print(
        f"{name:<10} {what:<20} median of {len(ratios)} rounds {statistics.median(ratios):.3f}, "
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
    given = parser.parse_args()
    given.only = given.only or list(MEASUREMENTS)
    make_models(given)
    print(f"load average before: {os.getloadavg()[0]:.2f}; numbers are only good on a machine that does nothing else")
    for name in given.only:
        compare_busy_with_idle(name, given)


if __name__ == "__main__":
    main()
