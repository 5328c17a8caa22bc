"""A step of the UNet as a CUDA graph: issued in one call, however slow the processor.

A step is some two thousand operations. To issue them one by one takes longer than a fast card, or one beside a slow
processor, works them. The first two steps are issued so, and libraries choose their ways in them; then a step is
captured, and if it says to the bit what the second said, all others are replayed.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

UNetStep = Callable[[Tensor], Tensor]  # latents [R, 4, h, w] to the noise predicted in them
EAGER_STEPS = 2  # after so many steps
MIN_STEPS_TO_CAPTURE = 6  # steps, at least: to capture one takes as long as to issue one


class CapturedStep:
    """What a step says, by a graph from the third call on. All that it reads must stay where it is in memory."""

    def __init__(
        self, step: UNetStep, capturing: Callable[[int], AbstractContextManager[None]], most_bytes: int | None = None
    ) -> None:
        """`capturing` is entered while operations are captured, after so many steps.

        Torch's memory, and what the driver takes for the graph besides, may be `most_bytes`.
        """
        self.step = step
        self.capturing = capturing
        self.budget_bytes = most_bytes
        self.calls = 0
        self.capture_failed = False  # to capture, which would fail again
        self.graph_bytes = 0  # that the driver keeps of the graph
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_input: Tensor | None = None
        self.static_output: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        self.calls += 1
        if self.graph is not None:
            return self.replay(latents)
        said = self.step(latents)
        if self.calls == EAGER_STEPS:
            self.capture(latents, said)
        return said

    def replay(self, latents: Tensor) -> Tensor:
        assert self.graph is not None
        assert self.static_input is not None
        assert self.static_output is not None
        self.static_input.copy_(latents)
        self.graph.replay()
        return self.static_output.clone()

    def capture(self, latents: Tensor, expected: Tensor) -> None:
        """Leaves no graph where something does not allow it, or where it does not say what is expected, to the bit."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own, in which it needs what a step took again
        before = measure_non_torch_bytes()
        self.graph, self.static_input = torch.cuda.CUDAGraph(), latents.clone()
        pool = torch.cuda.graph_pool_handle()
        try:
            with garbage_collection_paused():
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    with self.capturing(self.calls):
                        self.static_output = self.step(self.static_input)
                finally:
                    self.graph.capture_end()
            right = torch.equal(self.replay(latents), expected)
            self.graph_bytes = measure_non_torch_bytes() - before
            right = right and self.fits_budget()
        except RuntimeError:  # whatever torch, a library or the driver will not have captured, or no memory for it
            release_capture_pool(pool, latents.device)
            torch.cuda.synchronize()
            right = False
        if not right:
            self.capture_failed = True
            self.close()

    def fits_budget(self) -> bool:
        """Whether there is room for what the driver keeps of the graph, some kilobytes for each operation."""
        return self.budget_bytes is None or torch.cuda.memory_reserved() + self.graph_bytes <= self.budget_bytes

    def close(self) -> None:
        """Let go of the graph and its memory."""
        if self.graph is None:
            return
        self.graph.reset()
        self.graph = self.static_input = self.static_output = None
        torch.cuda.empty_cache()


def measure_non_torch_bytes() -> int:
    """Bytes of the card that are in use and not torch's, of whatever process."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def release_capture_pool(pool: tuple[int, int], device: torch.device) -> None:
    """Of the memory of a capture that broke off before its end: torch would keep it, and free nothing else any more.

    The first call raises where the capture came to its end, and then the graph itself lets go of the memory.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """No garbage is collected: among it may be what calls CUDA when it goes, which is not allowed in a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
