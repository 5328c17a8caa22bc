"""The planner's word kept? The memory that it foretells of each phase beside what live tensors and weights then take.

    python -m benchmarks.foretold                 Stable Diffusion v1's size, random weights: 256 to 768, 1 to 4 images
    python -m benchmarks.foretold --half          the same in half precision (on most processors: slow)
    python -m benchmarks.foretold --share 0.5     in a budget so far between the least and what would stream nothing

One step of denoising is drawn, and decoded. Bytes are counted tensor by tensor, on the processor.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.full_size import MODEL, make_model
from tinysd_batch.model.offload.peak_memory import LivePeak
from tinysd_batch.model.offload.stage_estimate import Phase, Shape, Way
from tinysd_batch.model.pipeline import TinySD

SIZES = (256, 512, 768)
IMAGES = (1, 2, 4)


def measured_peaks(model: TinySD, images: int, height: int, width: int) -> dict[str, int]:
    """Of each phase: the most bytes that live tensors and weights on the device take together while images are drawn.

    Every image has a prompt of its own.
    """
    peaks: dict[str, int] = {}
    working = model.memory.working

    @contextlib.contextmanager
    def watched(phase: Phase) -> Iterator[Way]:
        with LivePeak() as live, working(phase) as way:
            # Weights in the file's own pages are not made here, nor is what was computed before the loop.
            places = [one.place for part in model.fragments for one in part.host if one.is_onloaded]
            base = sum(one.nbytes for one in places if id(one.untyped_storage()) not in live.sizes)
            live.leave_out(places)
            yield way
            known = [layer.value for _, layer in model.hoisted.of_text]
            base += sum(value.nbytes for value in known if value is not None)
        peaks[phase.name] = live.peak + base

    model.memory.working = watched  # type: ignore[method-assign]
    prompts = [f"cat {number}" for number in range(images)]
    model.generate(prompts, 1, num_inference_steps=1, sampler="ddim", height=height, width=width)
    model.memory.working = working  # type: ignore[method-assign]
    return peaks


def budget_at(share: float, model: TinySD, shape: Shape) -> int:
    """Bytes: at 0 the least in which the batch can be drawn, at 1 what needs no streaming."""
    least, whole = model.memory.least(shape), max(phase.peak for phase in model.memory.phases(shape))
    return int(least + share * (whole - least))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--share", type=float)
    given = parser.parse_args()
    if not given.model.exists():
        make_model(given.model)
    dtype = torch.bfloat16 if given.half else "full"
    print(
        f"{'size':<10}{'images':>6}{'budget MB':>11}  {'phase':<14}{'foretold MB':>12}{'measured MB':>12}{'ratio':>8}"
    )
    for size in given.sizes:
        for images in given.images:
            model = TinySD.from_pretrained(given.model, device="cpu", dtype=dtype, vram_budget="20GB")
            shape = Shape(2 * images, size, size, model.info.max_tokens, images + 1)
            budget = None if given.share is None else budget_at(given.share, model, shape)
            if budget is not None:
                model = TinySD.from_pretrained(given.model, device="cpu", dtype=dtype, vram_budget=budget)
            foretold = {phase.name: phase.peak for phase in model.memory.phases(shape)}
            allowed = "none" if budget is None else f"{budget / 1e6:.0f}"
            for name, peak in measured_peaks(model, images, size, size).items():
                told = foretold[name]
                print(
                    f"{f'{size}x{size}':<10}{images:>6}{allowed:>11}  {name:<14}{told / 1e6:>12.1f}{peak / 1e6:>12.1f}"
                    f"{peak / told:>8.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
