"""A step of the UNet as a CUDA graph: issued in one call, however slow the processor.

A step is some two thousand operations. To issue them one by one takes longer than a fast card, or one beside a slow
processor, works them. The first two steps are issued so, and libraries choose their ways in them; then a step is
captured, and if it says to the bit what the second said, all others are replayed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]  # latents [R, 4, h, w] to the noise predicted in them
CAPTURED = 2  # after so many steps
WORTH_IT = 6  # steps, at least: to capture one takes as long as to issue one


class CapturedStep:
    """What a step says, by a graph from the third call on. All that it reads must stay where it is in memory."""

    def __init__(self, step: Step, capturing: Callable[[int], AbstractContextManager[None]]) -> None:
        """`capturing` is entered while operations are captured, after so many steps."""
        self.step = step
        self.capturing = capturing
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Tensor | None = None
        self.said: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        self.calls += 1
        if self.graph is not None:
            return self.replay(latents)
        said = self.step(latents)
        if self.calls == CAPTURED:
            self.capture(latents, said)
        return said

    def replay(self, latents: Tensor) -> Tensor:
        assert self.graph is not None
        assert self.given is not None
        assert self.said is not None
        self.given.copy_(latents)
        self.graph.replay()
        return self.said.clone()

    def capture(self, latents: Tensor, expected: Tensor) -> None:
        """Leaves no graph where something does not allow it, or where it does not say what is expected, to the bit."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own, in which it needs what a step took again
        self.graph, self.given = torch.cuda.CUDAGraph(), latents.clone()
        try:
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                with self.capturing(self.calls):
                    self.said = self.step(self.given)
            finally:
                self.graph.capture_end()
            right = torch.equal(self.replay(latents), expected)
        except RuntimeError:  # whatever torch, a library or the driver will not have captured, or no memory for it
            torch.cuda.synchronize()
            right = False
        if not right:
            self.close()

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
