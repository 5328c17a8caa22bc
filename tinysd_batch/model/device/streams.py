"""The two CUDA streams of a device: one computes, one copies."""

import contextlib
import functools
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_compute_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream that is the program's own: on the one that CUDA begins with nothing can be captured."""
    if device.type != "cuda":
        yield
        return
    usual, own = torch.cuda.current_stream(device), get_compute_stream(device)
    own.wait_stream(usual)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        usual.wait_stream(own)


@functools.cache
def get_compute_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each card: torch keeps memory, and libraries their workspaces, for each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def get_copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each card: torch hands out 32 in turn, and a new one would some day be that on which work is done."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
