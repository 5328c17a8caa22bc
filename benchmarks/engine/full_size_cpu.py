"""Stable Diffusion v1 at its own size with random weights: time and memory of 512x512 on the processor.

    python -m benchmarks.engine.full_size_cpu  draw one picture in 4 steps; print time and peak memory of each phase
    python -m benchmarks.engine.full_size_cpu --compare
        a guided step of ours and of diffusers, alternately, and the ratios;
                                                  --peers PYTHON: of optimum-quanto and SDNQ, too;
                                                  --low 240MB: of ours with so much memory, too
    python -m benchmarks.engine.full_size_cpu --budget 240MB
        the same picture in so much memory beside the program itself
    python -m benchmarks.engine.full_size_cpu --ways
        time and memory of 1, 2 and 4 images at once, with turbo and unet_bs 1
    python -m benchmarks.engine.full_size_cpu --share        memory of one worker and of three beside each other

The model is made on the first run (0.6 GB, in outputs/random-sd-v1, or --model FOLDER): codes of 2 bits drawn at random
with scales that keep activations in bounds. Pictures are noise; time and memory are those of any SD v1 model. Every
measurement runs in a process of its own; processor seconds and the peak of resident memory are the kernel's figures.
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

from tests.support.random_sd_v1 import MODEL, SD_V1_UNET, make_random_model

STEPS = 4
ROUNDS = 9
OPTION_SETS: dict[str, dict[str, object]] = {"plain": {}, "turbo": {"turbo": True}, "unet_bs 1": {"unet_bs": 1}}
PEERS = {"quanto": "optimum-quanto int2", "sdnq": "SDNQ uint2"}
FIRST_ROUNDS = 3
GIB = 2**30
Measurement = dict[str, Any]  # what a process measured: numbers by name, and the precision


# Making the model


# Measuring, in processes of their own


def read_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def read_peak_gib() -> float:
    """The peak of resident memory. Not from getrusage, which counts in what the parent process held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB


def measure_tinysd(arguments: argparse.Namespace) -> Measurement:
    """Pictures by the engine, or their denoising alone, in the precision that it finds best here."""
    from tinysd_batch.model.pipeline import TinySD

    imported = read_peak_gib()
    started = time.monotonic()
    ours = TinySD.from_pretrained(
        arguments.model, device="cpu", vram_budget=arguments.budget, turbo=arguments.turbo,
        unet_bs=arguments.unet_bs,
    )  # fmt: skip
    loaded = time.monotonic() - started, read_peak_gib()
    times: list[float] = []
    made = ours.generate(
        "a lake", range(arguments.images), num_inference_steps=arguments.steps, sampler="ddim", height=arguments.size,
        width=arguments.size, guidance_scale=7.5, output_type="np" if arguments.child == "picture" else "latent",
        callback=lambda *_: times.append(read_cpu_s()),
    )  # fmt: skip
    return {
        "imports_gib": imported, "load_s": loaded[0], "load_gib": loaded[1], "text_s": made.text_s,
        "denoise_s": made.denoise_s, "decode_s": made.decode_s, "peak_gib": read_peak_gib(),
        "step_processor_s": statistics.median(after - before for before, after in pairwise(times)),
        "precision": made.precision[0],
    }  # fmt: skip


def measure_diffusers_step(dtype: torch.dtype, steps: int, size: int) -> Measurement:
    """Guided steps by diffusers' own UNet, dense, channels-last."""
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
    times = []
    with torch.no_grad():
        for step in range(steps):
            before = read_cpu_s()
            unet(latents, 999 - step, context)
            times.append(read_cpu_s() - before)
    return {"step_processor_s": statistics.median(times[1:]), "peak_gib": read_peak_gib(), "precision": str(dtype)[6:]}


def child_command(kind: str, arguments: argparse.Namespace) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.engine.full_size_cpu", "--child", kind, "--model", str(arguments.model)]
    words += ["--steps", str(arguments.steps), "--size", str(arguments.size), "--threads", str(arguments.threads)]
    words += ["--images", str(arguments.images)] + (["--budget", arguments.budget] if arguments.budget else [])
    words += (["--turbo"] if arguments.turbo else []) + (["--unet_bs", "1"] if arguments.unet_bs else [])
    return words


def run_child_process(kind: str, arguments: argparse.Namespace) -> Measurement:
    return run_and_parse(child_command(kind, arguments), arguments.threads)


def run_and_parse(words: list[str], threads: int) -> Measurement:
    """What it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Measurement = json.loads(done.stdout.splitlines()[-1])
    return found


def pause_while_denoising(model: Path) -> None:
    """Say so when a first step is done, and go on when told."""
    from tinysd_batch.model.pipeline import TinySD

    def callback(step: int, *_: object) -> None:
        if step == 0:
            print("denoising", flush=True)
            sys.stdin.readline()

    ours = TinySD.from_pretrained(model, device="cpu")
    ours.generate("a lake", 1, num_inference_steps=2, height=64, width=64, output_type="latent", callback=callback)


def measure_shared_memory(arguments: argparse.Namespace) -> None:
    """The proportional set size counts a page that n processes share as an n-th of it in each."""
    print(f"{'workers':<10}{'MiB each':>10}{'of it files':>14}{'MiB together':>14}")
    for count in (1, 3):
        workers = [
            subprocess.Popen(
                child_command("waiting", arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]  # fmt: skip
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        found = [read_proportional_mib(worker.pid) for worker in workers]
        for worker in workers:
            worker.communicate("go on\n")
        each, files = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"{count:<10}{each:>10.0f}{files:>14.0f}{count * each:>14.0f}")


def read_proportional_mib(pid: int) -> tuple[float, float]:
    """Of a process: all, and what belongs to files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    total, files = (int(text.partition(f"\n{name}:")[2].split()[0]) / 1024 for name in ("Pss", "Pss_File"))
    return total, files


def run_as_child(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.child == "waiting":
        pause_while_denoising(arguments.model)
        return
    if arguments.child in ("picture", "ours"):
        found = measure_tinysd(arguments)
    else:
        found = measure_diffusers_step(getattr(torch, arguments.child), arguments.steps, arguments.size)
    print(json.dumps(found))


def measure_image(arguments: argparse.Namespace) -> None:
    found = run_child_process("picture", arguments)
    folder = arguments.model / "unet" / "diffusion_pytorch_model.safetensors"
    size, threads = arguments.size, arguments.threads
    budget = f", vram_budget {arguments.budget}" if arguments.budget else ""
    print(f"SD v1, random weights, {size}x{size}, {arguments.steps} steps, {threads} threads{budget}")
    print(f"{'UNet on disk':<44}{folder.stat().st_size / 1e6:.0f} MB")
    print(f"{'loading':<44}{found['load_s']:.1f} s")
    print(f"{'precision':<44}{found['precision']}")
    print(f"{'text':<44}{found['text_s']:.1f} s")
    print(f"{'denoising, a guided step':<44}{found['denoise_s'] / arguments.steps:.1f} s")
    print(f"{'decoding':<44}{found['decode_s']:.1f} s")
    for name, of in (("imports_gib", "imports alone"), ("load_gib", "after loading"), ("peak_gib", "whole picture")):
        print(f"{'peak resident memory, ' + of:<44}{found[name]:.2f} GiB")


def has_native_bfloat16() -> bool:
    """Whether this processor does, or has to emulate it, which takes many times as long."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def measure_peer_step(method: str, precision: str, arguments: argparse.Namespace) -> Measurement:
    words = [arguments.peers, "benchmarks/engine/peer_step.py", method, json.dumps(SD_V1_UNET), precision]
    return run_and_parse([*words, str(arguments.size), str(arguments.steps)], arguments.threads)


def measure_round(number: int, others: list[str], arguments: argparse.Namespace) -> dict[str, Measurement]:
    """Ours as it comes, ours with the weights kept unpacked, and diffusers, one after the other.

    What takes long or is of less interest joins the first rounds: diffusers in the precision that ours does not choose,
    ours with little memory, and other programs' 2-bit UNets, in the precision that ours chooses.
    """
    kept = argparse.Namespace(**{**vars(arguments), "turbo": True})
    found = {"ours": run_child_process("ours", arguments), "ours, turbo": run_child_process("ours", kept)}
    first, precision = number < FIRST_ROUNDS, found["ours"]["precision"]
    found |= {kind: run_child_process(kind, arguments) for kind in others if first or kind == precision}
    if first and arguments.low:
        little = argparse.Namespace(**{**vars(arguments), "budget": arguments.low})
        found[f"ours, {arguments.low}"] = run_child_process("ours", little)
    if first and arguments.peers:
        found |= {method: measure_peer_step(method, precision, arguments) for method in PEERS}
    return found


def compare_with_others(arguments: argparse.Namespace) -> None:
    others = ["bfloat16", "float32"] if has_native_bfloat16() else ["float32"]
    if "bfloat16" not in others:
        print("this processor only emulates bfloat16: compared with diffusers in float32 alone")
    found: dict[str, list[Measurement]] = {}
    for number in range(arguments.pairs):
        for name, result in measure_round(number, others, arguments).items():
            found.setdefault(name, []).append(result)
    print(f"{arguments.size}x{arguments.size}, {arguments.pairs} rounds, {arguments.threads} threads")
    for name, results in found.items():
        seconds = statistics.median(one["step_processor_s"] for one in results)
        peak = max(one["peak_gib"] for one in results)
        told = f"diffusers, dense {name}" if name in others else f"{PEERS.get(name, name)}, {results[0]['precision']}"
        print(f"{told:<32}{seconds:7.2f} processor seconds a guided step, peak {peak:.2f} GiB")
    for name in [name for name in found if name not in others]:
        for theirs in others:
            print_ratio(PEERS.get(name, name), theirs, found[name], found[theirs])


def print_ratio(mine: str, theirs: str, one: list[Measurement], other: list[Measurement]) -> None:
    """Of the rounds that both were in."""
    pairs = zip(one, other, strict=False)
    ratios = [first["step_processor_s"] / second["step_processor_s"] for first, second in pairs]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(f"{mine} takes {median:.2f} times {theirs} (quartiles {low:.2f} and {high:.2f}, {len(ratios)} rounds)")


def compare_options(arguments: argparse.Namespace) -> None:
    """Each way of drawing beside the plain one, alternately; a step's processor seconds are those of one image."""
    print(
        f"{'images at once':<16}{'way':<12}{'processor s an image and step':>30}{'against plain':>15}{'peak GiB':>10}"
    )
    for images in (1, 2, 4):
        runs: dict[str, list[Measurement]] = {name: [] for name in OPTION_SETS}
        for _ in range(arguments.pairs):
            for name, change in OPTION_SETS.items():
                given = argparse.Namespace(**{**vars(arguments), "images": images, **change})
                runs[name].append(run_child_process("ours", given))
        for name, found in runs.items():
            step = statistics.median(one["step_processor_s"] for one in found) / images
            ratio = statistics.median(
                one["step_processor_s"] / plain["step_processor_s"]
                for one, plain in zip(found, runs["plain"], strict=True)
            )
            peak = max(one["peak_gib"] for one in found)
            print(f"{images:<16}{name:<12}{step:>30.2f}{ratio:>14.2f}x{peak:>10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", help="keep within so much memory for weights and work, such as 240MB")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--peers", help="with --compare: the Python of an environment with optimum-quanto and sdnq")
    parser.add_argument("--low", metavar="BUDGET", help="with --compare: a vram_budget, such as 240MB")
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--ways", action="store_true")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--turbo", action="store_true")
    parser.add_argument("--unet_bs", type=int)
    parser.add_argument("--pairs", type=int, default=ROUNDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_as_child(arguments)
        return
    if not arguments.model.exists():
        make_random_model(arguments.model)
    run = (
        compare_with_others
        if arguments.compare
        else measure_shared_memory
        if arguments.share
        else compare_options
        if arguments.ways
        else measure_image
    )
    run(arguments)


if __name__ == "__main__":
    main()
