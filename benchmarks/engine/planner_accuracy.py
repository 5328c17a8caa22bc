"""The planner's word kept? The memory that it foretells of each phase beside what live tensors and weights then take.

    python -m benchmarks.engine.planner_accuracy  Stable Diffusion v1's size, random weights: 256 to 768, 1 to 4 images
    python -m benchmarks.engine.planner_accuracy --half          the same in half precision (on most processors: slow)
    python -m benchmarks.engine.planner_accuracy --share 0.5
        in a budget so far between the least and what would stream nothing

One step of denoising is drawn, and decoded. Bytes are counted tensor by tensor, on the processor.
"""

import argparse
from pathlib import Path

import torch

from tests.support.random_sd_v1 import MODEL, make_random_model
from tests.support.stage_peaks import interpolate_budget, measure_stage_peaks
from tinysd_batch.model.offload.stage_estimate import MicroBatchShape
from tinysd_batch.model.pipeline import TinySD

SIZES = (256, 512, 768)
IMAGES = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--share", type=float)
    given = parser.parse_args()
    if not given.model.exists():
        make_random_model(given.model)
    dtype = torch.bfloat16 if given.half else "full"
    print(
        f"{'size':<10}{'images':>6}{'budget MB':>11}  {'phase':<14}{'foretold MB':>12}{'measured MB':>12}{'ratio':>8}"
    )
    for size in given.sizes:
        for images in given.images:
            model = TinySD.from_pretrained(given.model, device="cpu", dtype=dtype, vram_budget="20GB")
            shape = MicroBatchShape(2 * images, size, size, model.info.max_tokens, images + 1)
            budget = None if given.share is None else interpolate_budget(given.share, model, shape)
            if budget is not None:
                model = TinySD.from_pretrained(given.model, device="cpu", dtype=dtype, vram_budget=budget)
            foretold = {phase.name: phase.peak_bytes for phase in model.planner.plan_stages(shape)}
            allowed = "none" if budget is None else f"{budget / 1e6:.0f}"
            for name, peak in measure_stage_peaks(model, images, size, size).items():
                told = foretold[name]
                print(
                    f"{f'{size}x{size}':<10}{images:>6}{allowed:>11}  {name:<14}{told / 1e6:>12.1f}{peak / 1e6:>12.1f}"
                    f"{peak / told:>8.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
