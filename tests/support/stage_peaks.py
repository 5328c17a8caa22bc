"""Measure the peak memory of each stage in this process."""

import contextlib
from collections.abc import Iterator

from tinysd_batch.model.offload.peak_memory import LivePeak
from tinysd_batch.model.offload.stage_estimate import Phase, Shape, Way
from tinysd_batch.model.pipeline import TinySD


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
