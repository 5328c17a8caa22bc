"""How the threads of torch wait for each other, decided before torch is imported. Imports no torch at module level.

A thread of GNU's OpenMP that has finished its part of a parallel region spins for several milliseconds, waiting for the
others. Beside another busy program one of them is often suspended meanwhile, and the spinning ones use up the time that
it needs: everything takes 5 to 20 times as long. Threads that sleep at once cost an idle machine more, since they are
woken thousands of times in each step of a large model. So they spin for a moment (70 microseconds on a Zen 5, 140 on
recent Intel cores), which bridges the gap from one operation to the next, and sleep then.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

# libgomp, which the wheels of torch contain, reads both. libomp and libiomp read the first, and sleep at once.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
USER_CHOICES = {*WAITING, "KMP_BLOCKTIME", "KMP_LIBRARY"}

logger = logging.getLogger(__name__)
is_too_late = False  # torch was imported before this package, so that OpenMP has not read our variables


def set_wait_policy() -> None:
    """Let waiting threads sleep soon, unless the user has chosen how they wait."""
    global is_too_late
    if USER_CHOICES.isdisjoint(os.environ):
        os.environ.update(WAITING)
        is_too_late = "torch" in sys.modules


def warn_if_threads_spin(count: int) -> None:
    """Log what to do where `count` threads will compute and OpenMP did not see the wait policy."""
    if is_too_late and count > 1:
        logger.warning(
            "torch was imported before tinysd_batch, so its threads spin while they wait, which is slow beside other "
            "busy programs; import tinysd_batch first, or set OMP_WAIT_POLICY=PASSIVE"
        )


@contextlib.contextmanager
def at_most_threads(count: int | None) -> Iterator[None]:
    """Let torch compute on at most `count` threads, any number for None, and restore the number afterwards."""
    import torch

    before = torch.get_num_threads()
    if count is None or before <= count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
