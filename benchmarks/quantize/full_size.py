"""Stable Diffusion v1 at its own size, 4.3 GB of random float32 weights: time and memory of quantizing it.

    python -m benchmarks.quantize.full_size                     level fast, to the end
    python -m benchmarks.quantize.full_size --level calib --recipe benchmarks/quantize/small_calib.toml
                                                           some 20 minutes on two cores; goes on after a stop.
                                                           Tells what the recipe that ships would take, too

The model is written on the first run (outputs/random-sd-v1-float, or --source FOLDER). Memory is read of the process as
it works: all that is resident, the file's mapped pages too, and what is its own. The result is left in --out.
"""

import argparse
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from tests.support.random_sd_v1 import make_float_model
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.quantize.estimate.duration import estimate_calibration_cost, measure_device_speed, sum_costs
from tinysd_batch.quantize.presets import DEFAULT_PRESET, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions, check_unet_tensors
from tinysd_batch.quantize.sources.open import open_source


def iter_process_memory(process: subprocess.Popen[bytes]) -> Iterator[tuple[int, int]]:
    """Bytes resident and bytes of its own, a few times a second until it ends."""
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        wanted = [line for line in lines if line.startswith(("VmHWM", "RssAnon"))]  # in this order
        if wanted:  # none are left of a process that has just ended
            resident, own = (int(line.split()[1]) * 1024 for line in wanted)
            yield resident, own
        time.sleep(0.05)


def echo_output(process: subprocess.Popen[bytes], lines: list[tuple[float, str]]) -> None:
    """Pass on what it says, and keep it with the time."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.monotonic(), line.decode()))
        print(line.decode(), end="", flush=True)


def print_extrapolation(lines: list[tuple[float, str]], ended: float, given: argparse.Namespace) -> None:
    """What each part of the work took, and what it would take with the recipe that ships, as work is foretold."""
    if any(line.startswith("resuming") for _, line in lines):
        print("part of it was done by an earlier run: no times of its parts")
        return
    marks = [next(at for at, line in lines if line.startswith(word)) for word in ("generating", "calibrating", "meas")]
    parts = [after - before for before, after in pairwise([*marks, ended])]
    foretold = [estimate_parts_s(given.source, recipe) for recipe in (read_recipe(given.recipe), read_recipe(None))]
    hours = 0.0
    for name, seconds, little, much in zip(
        ("drawing", "layers", "correcting, measuring"), parts, *foretold, strict=True
    ):
        scaled = seconds * much / little / 3600
        hours += scaled
        print(f"{name:<24}{seconds:>6.0f} s, foretold {little:.0f}; by the recipe that ships some {scaled:.1f} h")
    print(f"with the recipe that ships some {hours:.0f} hours in all, extrapolated")


def estimate_parts_s(source: Path, recipe: Recipe) -> tuple[float, float, float]:
    """What drawing, layers and what follows them should take here."""
    model = open_source(source, SourceOptions())
    part = model.unet()
    work = estimate_calibration_cost(
        part, model.vae(), get_preset_layouts(check_unet_tensors(part), DEFAULT_PRESET), recipe
    )
    speed = measure_device_speed(torch.device("cpu"))
    return (
        work.generation.duration_s(speed),
        sum_costs(work.layers.values()).duration_s(speed),
        work.evaluation.duration_s(speed),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("outputs/random-sd-v1-float"))
    parser.add_argument("--out", type=Path, default=Path("outputs/random-sd-v1-quantized"))
    parser.add_argument("--level", default="fast")
    parser.add_argument("--recipe", type=Path)
    given = parser.parse_args()
    if not given.source.exists():
        partial = given.source.with_name(given.source.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_float_model(partial)
        partial.rename(given.source)
    shutil.rmtree(given.out, ignore_errors=True)
    words = [
        sys.executable,
        "-m",
        "tinysd_batch",
        "quantize",
        given.source,
        given.out,
        "--level",
        given.level,
        "--no-samples",
    ]
    if given.recipe:
        words += ["--recipe", given.recipe]
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[tuple[float, str]] = []
    listener = threading.Thread(target=echo_output, args=(process, lines))
    listener.start()
    resident, own = (max(most) for most in zip(*iter_process_memory(process), strict=True))
    listener.join()
    if process.returncode:
        sys.exit(process.returncode)
    size = (given.out / "unet" / WEIGHTS_FILE).stat().st_size
    source = sum(file.stat().st_size for file in given.source.rglob("*.safetensors"))
    print(
        f"level {given.level}: {source / 1e9:.1f} GB of floats to a UNet of {size / 1e6:.0f} MB in "
        f"{time.monotonic() - started:.0f} s, {torch.get_num_threads()} cores\n"
        f"peak memory {resident / 1e9:.2f} GB, mapped pages of the source included; {own / 1e9:.2f} GB of its own"
    )
    if given.level == "calib":
        print_extrapolation(lines, time.monotonic(), given)


if __name__ == "__main__":
    main()
