"""Measure the peak memory of each stage in this process."""

import contextlib
from collections.abc import Iterator

from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan
from tinysd_batch.model.pipeline import TinySD


def measure_stage_peaks(model: TinySD, images: int, height: int, width: int) -> dict[str, int]:
    """Of each phase: the most bytes that live tensors and weights on the device take together while images are drawn.

    Every image has a prompt of its own.
    """
    peaks: dict[str, int] = {}
    working = model.planner.executing

    @contextlib.contextmanager
    def watched(plan: StagePlan) -> Iterator[ExecutionStrategy]:
        with PeakMemoryTracker() as live, working(plan) as strategy:
            # Weights in the file's own pages are not made here, nor is what was computed before the loop.
            places = [one.module_tensor for part in model.fragments for one in part.host_tensors if one.is_onloaded]
            base = sum(one.nbytes for one in places if id(one.untyped_storage()) not in live.sizes)
            live.exclude(places)
            yield strategy
            known = [layer.value for _, layer in model.precomputed.context_layers]
            base += sum(value.nbytes for value in known if value is not None)
        peaks[plan.name] = live.peak_bytes + base

    model.planner.executing = watched  # type: ignore[method-assign]
    prompts = [f"cat {number}" for number in range(images)]
    model.generate(prompts, 1, num_inference_steps=1, sampler="ddim", height=height, width=width)
    model.planner.executing = working  # type: ignore[method-assign]
    return peaks


def interpolate_budget(share: float, model: TinySD, shape: MicroBatchShape) -> int:
    """Bytes: at 0 the least in which the batch can be drawn, at 1 what needs no streaming."""
    least, whole = (
        model.planner.estimate_min_budget(shape),
        max(phase.peak_bytes for phase in model.planner.plan_stages(shape)),
    )
    return int(least + share * (whole - least))
