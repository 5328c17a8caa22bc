"""A step of the UNet as a CUDA graph: issued in one call, however slow the processor.

A step is some two thousand operations. To issue them one by one takes longer than a fast card, or one beside a slow
processor, works them. The first step is issued so, and libraries choose their ways in it; the second is captured, and
from then on replayed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]  # latents [R, 4, h, w] to the noise predicted in them
WORTH_IT = 4  # steps, at least: to capture one takes as long as to issue one


class CapturedStep:
    """What a step says, by a graph from the second call on. All that it reads must stay where it is in memory."""

    def __init__(self, step: Step, capturing: Callable[[], AbstractContextManager[None]]) -> None:
        """`capturing` is entered while operations are captured."""
        self.step = step
        self.capturing = capturing
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Tensor | None = None
        self.said: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.capture(latents)
        if self.graph is None or self.given is None or self.said is None:
            return self.step(latents)
        self.given.copy_(latents)
        self.graph.replay()
        return self.said.clone()

    def capture(self, latents: Tensor) -> None:
        """Leaves no graph where something does not allow it; then steps are issued one by one as ever."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own, in which it needs what the first step took again
        graph, self.given = torch.cuda.CUDAGraph(), latents.clone()
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                with self.capturing():
                    self.said = self.step(self.given)
            finally:
                graph.capture_end()
        except RuntimeError:  # whatever torch, a library or the driver will not have captured, or no memory for it
            torch.cuda.synchronize()
            return
        self.graph = graph

    def close(self) -> None:
        """Let go of the graph and its memory."""
        if self.graph is not None:
            self.graph.reset()
        self.graph = self.given = self.said = None


@contextlib.contextmanager
def on_working_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream that is the program's own: on the one that CUDA begins with nothing can be captured."""
    if device.type != "cuda":
        yield
        return
    usual, own = torch.cuda.current_stream(device), working_stream(device)
    own.wait_stream(usual)
    with torch.cuda.stream(own):
        yield
    usual.wait_stream(own)


@functools.cache
def working_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each card: torch keeps memory, and libraries their workspaces, for each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
