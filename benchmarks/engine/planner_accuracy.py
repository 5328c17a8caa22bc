"""Compare the memory that the planner estimates for each stage with what live tensors and weights take.

    python -m benchmarks.engine.planner_accuracy
        SD v1's size, random weights, 256 to 768 pixels, 1 to 4 images
    python -m benchmarks.engine.planner_accuracy --half
        the same in half precision, which is slow on most CPUs
    python -m benchmarks.engine.planner_accuracy --share 0.5
        with a budget half-way between the smallest that works and the smallest without streaming

One denoising step is run, and the result decoded. Bytes are counted tensor by tensor, on the CPU.
"""

import argparse
from pathlib import Path

import torch

from tests.support.models.random_sd_v1 import MODEL, make_random_model
from tests.support.models.stage_peaks import interpolate_budget, measure_stage_peaks
from tinysd_batch.model.offload.stage_estimate import MicroBatchShape
from tinysd_batch.model.tiny_sd import TinySD

SIZES = (256, 512, 768)
IMAGES = (1, 2, 4)


def compare(size: int, images: int, arguments: argparse.Namespace) -> None:
    """Print a line for each stage of generating `images` images of `size` pixels."""
    dtype = torch.bfloat16 if arguments.half else "full"
    model = TinySD.from_pretrained(arguments.model, device="cpu", dtype=dtype, vram_budget="20GB")
    shape = MicroBatchShape(2 * images, size, size, model.info.max_tokens, images + 1)
    budget = None if arguments.share is None else interpolate_budget(arguments.share, model, shape)
    if budget is not None:
        model = TinySD.from_pretrained(arguments.model, device="cpu", dtype=dtype, vram_budget=budget)
    estimates = {plan.name: plan.peak_bytes for plan in model.planner.plan_stages(shape)}
    budget_mb = "none" if budget is None else f"{budget / 1e6:.0f}"
    for name, measured in measure_stage_peaks(model, images, size, size).items():
        estimated = estimates[name]
        print(
            f"{f'{size}x{size}':<10}{images:>6}{budget_mb:>11}  {name:<14}{estimated / 1e6:>13.1f}"
            f"{measured / 1e6:>13.1f}{measured / estimated:>8.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--share", type=float)
    arguments = parser.parse_args()
    if not arguments.model.exists():
        make_random_model(arguments.model)
    print(
        f"{'size':<10}{'images':>6}{'budget MB':>11}  {'stage':<14}{'estimated MB':>13}{'measured MB':>13}{'ratio':>8}"
    )
    for size in arguments.sizes:
        for images in arguments.images:
            compare(size, images, arguments)


if __name__ == "__main__":
    main()
