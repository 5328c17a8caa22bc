"""Time and memory of quantizing a model of Stable Diffusion v1's size: 4.3 GB of random float32 weights.

    python -m benchmarks.quantize.full_size
        level fast, to the end
    python -m benchmarks.quantize.full_size --level calib --recipe benchmarks/quantize/small_calib.toml
        about 20 minutes on two cores; resumes after an interruption; also prints what the shipped recipe would take

The model is written on the first run (outputs/random-sd-v1-float, or --source FOLDER). Memory is read from the running
process: all resident memory, which includes mapped pages of files, and anonymous memory. The result is left in --out.
"""

import argparse
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from tests.support.models.random_sd_v1 import make_float_model
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.quantize.estimate.duration import estimate_calibration_cost, measure_device_speed, sum_costs
from tinysd_batch.quantize.presets import DEFAULT_PRESET, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions, check_unet_tensors
from tinysd_batch.quantize.sources.formats import open_source

# The parts of the work, and the status line with which each begins.
PARTS = {"generation": r"generating ", "layers": r"calibrating [\d,]+ layers", "evaluation": r"measuring "}


def iter_process_memory(process: subprocess.Popen[bytes]) -> Iterator[tuple[int, int]]:
    """Yield a process's peak resident bytes and its anonymous bytes, several times a second until it ends."""
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        entries = [line for line in lines if line.startswith(("VmHWM", "RssAnon"))]  # in this order
        if entries:  # a process that has just ended has none
            resident_bytes, anonymous_bytes = (int(line.split()[1]) * 1024 for line in entries)
            yield resident_bytes, anonymous_bytes
        time.sleep(0.05)


def echo_output(process: subprocess.Popen[bytes], lines: list[tuple[float, str]]) -> None:
    """Print the process's output, and append each line to `lines` with its time."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.monotonic(), line.decode()))
        print(line.decode(), end="", flush=True)


def print_extrapolation(lines: list[tuple[float, str]], ended: float, arguments: argparse.Namespace) -> None:
    """Print what each part of the work took, and extrapolate by estimated work what the shipped recipe would take."""
    if any(line.startswith("resuming") for _, line in lines):
        print("an earlier run did some of the work: the parts were not timed")
        return
    starts = [next(at for at, line in lines if re.match(pattern, line)) for pattern in PARTS.values()]
    durations = [after - before for before, after in pairwise([*starts, ended])]
    estimated = estimate_parts_s(arguments.source, read_recipe(arguments.recipe))
    estimated_shipped = estimate_parts_s(arguments.source, read_recipe(None))
    total_hours = 0.0
    for name, measured_s, estimated_s, shipped_s in zip(PARTS, durations, estimated, estimated_shipped, strict=True):
        hours = measured_s * shipped_s / estimated_s / 3600
        total_hours += hours
        measured = f"{measured_s:>6.0f} s, estimated {estimated_s:.0f} s"
        print(f"{name:<24}{measured}; with the shipped recipe about {hours:.1f} h")
    print(f"with the shipped recipe about {total_hours:.0f} hours in total, extrapolated")


def estimate_parts_s(source: Path, recipe: Recipe) -> tuple[float, float, float]:
    """Estimate the seconds of each part on this machine."""
    model = open_source(source, SourceOptions())
    component = model.unet()
    layouts = get_preset_layouts(check_unet_tensors(component), DEFAULT_PRESET)
    cost = estimate_calibration_cost(component, model.vae(), layouts, recipe)
    speed = measure_device_speed(torch.device("cpu"))
    return (
        cost.generation.duration_s(speed),
        sum_costs(cost.layers.values()).duration_s(speed),
        cost.evaluation.duration_s(speed),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("outputs/random-sd-v1-float"))
    parser.add_argument("--out", type=Path, default=Path("outputs/random-sd-v1-quantized"))
    parser.add_argument("--level", default="fast")
    parser.add_argument("--recipe", type=Path)
    arguments = parser.parse_args()
    source, out = arguments.source, arguments.out
    if not source.exists():
        partial = source.with_name(source.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_float_model(partial)
        partial.rename(source)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tinysd_batch", "quantize", source, out]
    command += ["--level", arguments.level, "--no-samples"]
    command += ["--recipe", arguments.recipe] if arguments.recipe else []
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[tuple[float, str]] = []
    listener = threading.Thread(target=echo_output, args=(process, lines))
    listener.start()
    resident_bytes, anonymous_bytes = (max(values) for values in zip(*iter_process_memory(process), strict=True))
    listener.join()
    if process.returncode:
        sys.exit(process.returncode)
    unet_bytes = (out / "unet" / WEIGHTS_FILE).stat().st_size
    source_bytes = sum(file.stat().st_size for file in source.rglob("*.safetensors"))
    print(
        f"level {arguments.level}: {source_bytes / 1e9:.1f} GB of floats to a UNet of {unet_bytes / 1e6:.0f} MB in "
        f"{time.monotonic() - started:.0f} s, {torch.get_num_threads()} cores\n"
        f"peak memory {resident_bytes / 1e9:.2f} GB, including mapped pages of the source; "
        f"{anonymous_bytes / 1e9:.2f} GB of it anonymous"
    )
    if arguments.level == "calib":
        print_extrapolation(lines, time.monotonic(), arguments)


if __name__ == "__main__":
    main()
