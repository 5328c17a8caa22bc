"""Time and memory of 512x512 images on the CPU, with random weights of Stable Diffusion v1's size.

    python -m benchmarks.engine.full_size_cpu
        generate one image in 4 steps; print time and peak memory of each stage
    python -m benchmarks.engine.full_size_cpu --compare
        a guided step of ours and of diffusers, alternately, and the ratios
        --peers PYTHON: also of optimum-quanto and SDNQ, in that Python's environment
        --low 240MB: also of ours with this memory budget
    python -m benchmarks.engine.full_size_cpu --budget 240MB
        the same image with a memory budget, which does not count the program itself
    python -m benchmarks.engine.full_size_cpu --ways
        time and memory of micro-batches of 1, 2 and 4 images, plain, with turbo and with unet_bs 1
    python -m benchmarks.engine.full_size_cpu --share
        memory of one worker, and of three that share the model's pages

The model is written on the first run (0.6 GB, in outputs/random-sd-v1, or --model FOLDER): random 2-bit codes, with
scales that keep activations bounded. Images are noise; time and memory are those of any SD v1 model. Every measurement
runs in a process of its own. CPU seconds and peak resident memory are the kernel's figures.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.models.random_sd_v1 import MODEL, SD_V1_UNET, make_random_model

STEPS = 4
ROUNDS = 9
OPTION_SETS: dict[str, dict[str, object]] = {"plain": {}, "turbo": {"turbo": True}, "unet_bs 1": {"unet_bs": 1}}
PEERS = {"quanto": "optimum-quanto int2", "sdnq": "SDNQ uint2"}
FIRST_ROUNDS = 3
GIB = 2**30
Measurement = dict[str, Any]  # figures of one process by name, and the precision


# Within a child process


def read_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_peak_gib() -> float:
    """Return the peak of resident memory. getrusage would include what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB


def measure_tinysd(arguments: argparse.Namespace) -> Measurement:
    """Generate with the engine, with decoding or without, in the precision that it chooses on this machine."""
    from tinysd_batch.model.tiny_sd import TinySD

    imports_gib = read_peak_gib()
    started = time.monotonic()
    model = TinySD.from_pretrained(
        arguments.model, device="cpu", vram_budget=arguments.budget, turbo=arguments.turbo,
        unet_bs=arguments.unet_bs,
    )  # fmt: skip
    load_s, load_gib = time.monotonic() - started, read_peak_gib()
    cpu_times: list[float] = []
    generated = model.generate(
        "a lake", range(arguments.images), num_inference_steps=arguments.steps, sampler="ddim", height=arguments.size,
        width=arguments.size, guidance_scale=7.5, output_type="np" if arguments.child == "image" else "latent",
        callback=lambda *_: cpu_times.append(read_cpu_s()),
    )  # fmt: skip
    return {
        "imports_gib": imports_gib, "load_s": load_s, "load_gib": load_gib, "text_s": generated.text_s,
        "denoise_s": generated.denoise_s, "decode_s": generated.decode_s, "peak_gib": read_peak_gib(),
        "step_cpu_s": statistics.median(after - before for before, after in pairwise(cpu_times)),
        "precision": generated.precision[0],
    }  # fmt: skip


def measure_diffusers_step(dtype: torch.dtype, steps: int, size: int) -> Measurement:
    """Run guided steps of diffusers' own UNet, dense, channels-last."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_V1_UNET)
    unet = unet.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.001)
    unet = unet.to(memory_format=torch.channels_last).eval()
    latents = torch.randn(2, 4, size // 8, size // 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    context = torch.randn(2, 77, 768, dtype=dtype)
    cpu_times = []
    with torch.no_grad():
        for step in range(steps):
            before = read_cpu_s()
            unet(latents, 999 - step, context)
            cpu_times.append(read_cpu_s() - before)
    return {"step_cpu_s": statistics.median(cpu_times[1:]), "peak_gib": read_peak_gib(), "precision": str(dtype)[6:]}


def pause_while_denoising(model_folder: Path) -> None:
    """Print a line after the first step, and wait for a line of input before continuing."""
    from tinysd_batch.model.tiny_sd import TinySD

    def callback(step: int, *_: object) -> None:
        if step == 0:
            print("denoising", flush=True)
            sys.stdin.readline()

    model = TinySD.from_pretrained(model_folder, device="cpu")
    model.generate("a lake", 1, num_inference_steps=2, height=64, width=64, output_type="latent", callback=callback)


def run_as_child(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.child == "waiting":
        pause_while_denoising(arguments.model)
        return
    if arguments.child in ("image", "ours"):
        measurement = measure_tinysd(arguments)
    else:
        measurement = measure_diffusers_step(getattr(torch, arguments.child), arguments.steps, arguments.size)
    print(json.dumps(measurement))


# Starting child processes


def child_command(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return the command for a child process that runs the measurement called `name`."""
    command = [sys.executable, "-m", "benchmarks.engine.full_size_cpu", "--child", name]
    command += ["--model", str(arguments.model), "--steps", str(arguments.steps), "--size", str(arguments.size)]
    command += ["--threads", str(arguments.threads), "--images", str(arguments.images)]
    command += ["--budget", arguments.budget] if arguments.budget else []
    command += ["--turbo"] if arguments.turbo else []
    command += ["--unet_bs", "1"] if arguments.unet_bs else []
    return command


def run_child_process(name: str, arguments: argparse.Namespace) -> Measurement:
    return run_and_parse(child_command(name, arguments), arguments.threads)


def run_and_parse(command: list[str], threads: int) -> Measurement:
    """Run a command, and parse the JSON in the last line that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    measurement: Measurement = json.loads(done.stdout.splitlines()[-1])
    return measurement


def measure_peer_step(method: str, precision: str, arguments: argparse.Namespace) -> Measurement:
    command = [arguments.peers, "benchmarks/engine/peer_step.py", method, json.dumps(SD_V1_UNET), precision]
    return run_and_parse([*command, str(arguments.size), str(arguments.steps)], arguments.threads)


def change_arguments(arguments: argparse.Namespace, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), **changes})


# What the options select


def measure_image(arguments: argparse.Namespace) -> None:
    """Print time and memory of one image."""
    measured = run_child_process("image", arguments)
    weights = arguments.model / "unet" / "diffusion_pytorch_model.safetensors"
    size, threads = arguments.size, arguments.threads
    budget = f", vram_budget {arguments.budget}" if arguments.budget else ""
    print(f"SD v1, random weights, {size}x{size}, {arguments.steps} steps, {threads} threads{budget}")
    print(f"{'UNet on disk':<44}{weights.stat().st_size / 1e6:.0f} MB")
    print(f"{'loading':<44}{measured['load_s']:.1f} s")
    print(f"{'precision':<44}{measured['precision']}")
    print(f"{'text encoding':<44}{measured['text_s']:.1f} s")
    print(f"{'denoising, a guided step':<44}{measured['denoise_s'] / arguments.steps:.1f} s")
    print(f"{'decoding':<44}{measured['decode_s']:.1f} s")
    for key, label in (("imports_gib", "imports only"), ("load_gib", "after loading"), ("peak_gib", "whole image")):
        print(f"{'peak resident memory, ' + label:<44}{measured[key]:.2f} GiB")


def has_native_bfloat16() -> bool:
    """Return whether the CPU computes in bfloat16. Emulating it takes many times longer."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure_round(number: int, dense: list[str], arguments: argparse.Namespace) -> dict[str, Measurement]:
    """Measure one after the other: ours, ours with turbo, and diffusers' dense UNet.

    Slow or less important measurements are part of the first rounds only: diffusers in precisions that ours does not
    choose, ours with little memory, and other programs' 2-bit UNets, in the precision that ours chooses.
    """
    turbo = change_arguments(arguments, turbo=True)
    measured = {"ours": run_child_process("ours", arguments), "ours, turbo": run_child_process("ours", turbo)}
    is_first, precision = number < FIRST_ROUNDS, measured["ours"]["precision"]
    measured |= {name: run_child_process(name, arguments) for name in dense if is_first or name == precision}
    if is_first and arguments.low:
        low_memory = change_arguments(arguments, budget=arguments.low)
        measured[f"ours, {arguments.low}"] = run_child_process("ours", low_memory)
    if is_first and arguments.peers:
        measured |= {method: measure_peer_step(method, precision, arguments) for method in PEERS}
    return measured


def compare_with_others(arguments: argparse.Namespace) -> None:
    """Print a guided step of ours beside those of diffusers and of other 2-bit UNets."""
    dense = ["bfloat16", "float32"] if has_native_bfloat16() else ["float32"]
    if "bfloat16" not in dense:
        print("this CPU only emulates bfloat16: compared with diffusers in float32 only")
    results: dict[str, list[Measurement]] = {}
    for number in range(arguments.pairs):
        for name, measurement in measure_round(number, dense, arguments).items():
            results.setdefault(name, []).append(measurement)
    print(f"{arguments.size}x{arguments.size}, {arguments.pairs} rounds, {arguments.threads} threads")
    for name, rounds in results.items():
        seconds = statistics.median(measurement["step_cpu_s"] for measurement in rounds)
        peak = max(measurement["peak_gib"] for measurement in rounds)
        label = f"diffusers, dense {name}" if name in dense else f"{PEERS.get(name, name)}, {rounds[0]['precision']}"
        print(f"{label:<32}{seconds:7.2f} CPU seconds per guided step, peak {peak:.2f} GiB")
    for name in [name for name in results if name not in dense]:
        for baseline in dense:
            print_ratio(PEERS.get(name, name), baseline, results[name], results[baseline])


def print_ratio(name: str, baseline: str, rounds: list[Measurement], baseline_rounds: list[Measurement]) -> None:
    """Print the ratio of CPU seconds over the rounds that have both."""
    pairs = zip(rounds, baseline_rounds, strict=False)
    ratios = [measured["step_cpu_s"] / reference["step_cpu_s"] for measured, reference in pairs]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(f"{name} takes {median:.2f} times {baseline} (quartiles {low:.2f} and {high:.2f}, {len(ratios)} rounds)")


def compare_options(arguments: argparse.Namespace) -> None:
    """Compare each set of options with the plain one, alternately. CPU seconds of a step are divided by the images."""
    print(f"{'images at once':<16}{'options':<12}{'CPU s per image and step':>30}{'against plain':>15}{'peak GiB':>10}")
    for images in (1, 2, 4):
        results: dict[str, list[Measurement]] = {name: [] for name in OPTION_SETS}
        for _ in range(arguments.pairs):
            for name, options in OPTION_SETS.items():
                changed = change_arguments(arguments, images=images, **options)
                results[name].append(run_child_process("ours", changed))
        for name, rounds in results.items():
            step_s = statistics.median(measurement["step_cpu_s"] for measurement in rounds) / images
            ratio = statistics.median(
                measurement["step_cpu_s"] / plain["step_cpu_s"]
                for measurement, plain in zip(rounds, results["plain"], strict=True)
            )
            peak = max(measurement["peak_gib"] for measurement in rounds)
            print(f"{images:<16}{name:<12}{step_s:>30.2f}{ratio:>14.2f}x{peak:>10.2f}", flush=True)


def measure_shared_memory(arguments: argparse.Namespace) -> None:
    """Print the proportional set size of workers: a page that n processes share counts as 1/n in each."""
    print(f"{'workers':<10}{'MiB each':>10}{'of it files':>14}{'MiB together':>14}")
    for count in (1, 3):
        command = child_command("waiting", arguments)
        workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        sizes = [read_proportional_mib(worker.pid) for worker in workers]
        for worker in workers:
            worker.communicate("continue\n")
        each, files = (statistics.mean(values) for values in zip(*sizes, strict=True))
        print(f"{count:<10}{each:>10.0f}{files:>14.0f}{count * each:>14.0f}")


def read_proportional_mib(pid: int) -> tuple[float, float]:
    """Return the proportional set size of a process, and the part of it that belongs to files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    total, files = (int(text.partition(f"\n{name}:")[2].split()[0]) / 1024 for name in ("Pss", "Pss_File"))
    return total, files


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", help="memory budget for weights and activations, such as 240MB")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--peers", help="with --compare: the Python of an environment with optimum-quanto and sdnq")
    parser.add_argument("--low", metavar="BUDGET", help="with --compare: also measure this vram_budget, such as 240MB")
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--turbo", action="store_true")
    parser.add_argument("--unet_bs", type=int)
    parser.add_argument("--pairs", type=int, default=ROUNDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = new_parser().parse_args()
    if arguments.child:
        run_as_child(arguments)
        return
    if not arguments.model.exists():
        make_random_model(arguments.model)
    if arguments.compare:
        compare_with_others(arguments)
    elif arguments.share:
        measure_shared_memory(arguments)
    elif arguments.ways:
        compare_options(arguments)
    else:
        measure_image(arguments)


if __name__ == "__main__":
    main()
