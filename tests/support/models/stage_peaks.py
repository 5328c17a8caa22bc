"""Measure the peak memory of each stage in this process."""

import contextlib
from collections.abc import Iterator

from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, StagePlan
from tinysd_batch.model.tiny_sd import TinySD


def measure_stage_peaks(model: TinySD, images: int, height: int, width: int) -> dict[str, int]:
    """Generate images, each with a prompt of its own, and return the peak memory of each stage.

    Counted are the bytes of live tensors and of weights on the device.
    """
    peaks: dict[str, int] = {}
    executing = model.planner.executing

    @contextlib.contextmanager
    def executing_and_tracking(plan: StagePlan) -> Iterator[ExecutionStrategy]:
        with PeakMemoryTracker() as tracker, executing(plan) as strategy:
            # The tracker does not see weights in the pages of their file, nor tensors precomputed before the loop.
            weights = [
                tensor.module_tensor
                for component in model.fragments
                for tensor in component.host_tensors
                if tensor.is_onloaded
            ]
            untracked = sum(weight.nbytes for weight in weights if id(weight.untyped_storage()) not in tracker.sizes)
            tracker.exclude(weights)
            yield strategy
            precomputed = [layer.value for _, layer in model.precomputed.context_layers]
            untracked += sum(value.nbytes for value in precomputed if value is not None)
        peaks[plan.name] = tracker.peak_bytes + untracked

    model.planner.executing = executing_and_tracking  # type: ignore[method-assign]
    prompts = [f"cat {number}" for number in range(images)]
    model.generate(prompts, 1, num_inference_steps=1, sampler="ddim", height=height, width=width)
    model.planner.executing = executing  # type: ignore[method-assign]
    return peaks


def interpolate_budget(share: float, model: TinySD, shape: MicroBatchShape) -> int:
    """Return a budget in bytes: at share 0 the smallest that works, at share 1 the smallest without streaming."""
    smallest = model.planner.estimate_min_budget(shape)
    without_streaming = max(plan.peak_bytes for plan in model.planner.plan_stages(shape))
    return int(smallest + share * (without_streaming - smallest))
