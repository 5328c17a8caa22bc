"""Replay the UNet step as a CUDA graph.

A step launches about 2,000 kernels. On a fast GPU, or with a slow CPU, launching them takes longer than running them.
The first two steps run eagerly so that cuDNN and cuBLAS can choose their algorithms. Then a step is captured. If its
output is bit-identical to the second step's, the remaining steps replay the graph, otherwise they run eagerly.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

UNetStep = Callable[[Tensor], Tensor]  # latents [R, 4, h, w] to the predicted noise
EAGER_STEPS = 2  # before a step is captured
MIN_STEPS_TO_CAPTURE = 6  # capturing a step takes as long as running one eagerly


class CapturedStep:
    """Run a UNet step, from the third call on by replaying a CUDA graph.

    A graph reads and writes fixed addresses, so all tensors that the step uses must stay where they are.
    """

    def __init__(
        self, step: UNetStep, capturing: Callable[[int], AbstractContextManager[None]], budget_bytes: int | None = None
    ) -> None:
        """Wrap a step.

        Args:
            step: the function to capture.
            capturing: returns a context to capture in, given the number of eager steps so far.
            budget_bytes: limit for torch's memory together with what the driver takes for the graph.
        """
        self.step = step
        self.capturing = capturing
        self.budget_bytes = budget_bytes
        self.calls = 0
        self.capture_failed = False  # it would fail again
        self.graph_bytes = 0  # what the driver keeps for the graph
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_input: Tensor | None = None
        self.static_output: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        self.calls += 1
        if self.graph is not None:
            return self.replay(latents)
        noise = self.step(latents)
        if self.calls == EAGER_STEPS:
            self.capture(latents, noise)
        return noise

    def replay(self, latents: Tensor) -> Tensor:
        assert self.graph is not None
        assert self.static_input is not None
        assert self.static_output is not None
        self.static_input.copy_(latents)
        self.graph.replay()
        return self.static_output.clone()

    def capture(self, latents: Tensor, expected: Tensor) -> None:
        """Capture the step as a graph. Discard the graph if capturing fails or its output is not exactly `expected`."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has its own memory pool, as large as what an eager step used
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
            usable = torch.equal(self.replay(latents), expected)
            self.graph_bytes = measure_non_torch_bytes() - before
            usable = usable and self.fits_budget()
        except RuntimeError:  # torch, a library or the driver refused an operation in a capture, or memory ran out
            release_capture_pool(pool, latents.device)
            torch.cuda.synchronize()
            usable = False
        if not usable:
            logger.info("the UNet step could not be captured as a CUDA graph; steps run eagerly")
            self.capture_failed = True
            self.close()

    def fits_budget(self) -> bool:
        """Whether what the driver keeps for the graph fits, too: some kilobytes per operation."""
        return self.budget_bytes is None or torch.cuda.memory_reserved() + self.graph_bytes <= self.budget_bytes

    def close(self) -> None:
        """Release the graph and its memory."""
        if self.graph is None:
            return
        self.graph.reset()
        self.graph = self.static_input = self.static_output = None
        torch.cuda.empty_cache()


def measure_non_torch_bytes() -> int:
    """Return the GPU memory in use that is not torch's, by any process."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def release_capture_pool(pool: tuple[int, int], device: torch.device) -> None:
    """Release the memory pool of a capture that was aborted.

    Torch would keep it, and would not free any other cached memory from then on. If the capture did complete, the first
    call raises, and the graph itself releases the pool.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Collect garbage now and pause the collector: finalizers may call CUDA, which is not allowed in a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
