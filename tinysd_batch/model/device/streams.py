"""The two CUDA streams of a device: one computes, one copies."""

import contextlib
import functools
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_compute_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream of our own: CUDA cannot capture graphs on its default stream."""
    if device.type != "cuda":
        yield
        return
    outer, compute = torch.cuda.current_stream(device), get_compute_stream(device)
    compute.wait_stream(outer)
    try:
        with torch.cuda.stream(compute):
            yield
    finally:
        outer.wait_stream(compute)


@functools.cache
def get_compute_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the GPU's one compute stream: torch keeps cached memory and library workspaces per stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the GPU's one copy stream.

    Torch hands out 32 streams in rotation, so creating one per stage would sooner or later return the compute stream.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
