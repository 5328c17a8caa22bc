"""Choose how torch's threads wait for each other, which must be done before torch is imported.

This module is imported with the package, before the current folder is removed from the import path, so it imports only
modules that Python has loaded already.

A thread of GNU OpenMP that has finished its part of a parallel region spins for several milliseconds while it waits for
the others. If another program is busy, one thread is often suspended at that time, and the spinning threads use up the
CPU time that it needs: everything takes 5 to 20 times as long. On an idle machine, threads that sleep at once are slow,
because they are woken thousands of times in each step of a large model. So they spin for a moment (70 microseconds on a
Zen 5, 140 on recent Intel cores), which covers the gap between two operations, and then sleep.
"""

import os
import sys

# libgomp, which torch's wheels contain, reads both. libomp and libiomp read only the first, and sleep at once.
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
WAIT_POLICY_VARIABLES = {*WAIT_POLICY, "KMP_BLOCKTIME", "KMP_LIBRARY"}

was_torch_imported_first = False  # so that OpenMP has not read the variables that we set


def set_wait_policy() -> None:
    """Make waiting threads sleep soon, unless the user has chosen how they wait."""
    global was_torch_imported_first
    if WAIT_POLICY_VARIABLES.isdisjoint(os.environ):
        os.environ.update(WAIT_POLICY)
        was_torch_imported_first = "torch" in sys.modules


def warn_if_threads_spin(count: int) -> None:
    """Log a warning if several threads will compute and OpenMP has not read the wait policy."""
    import logging

    if was_torch_imported_first and count > 1:
        logging.getLogger(__name__).warning(
            "torch was imported before tinysd_batch, so its threads spin while they wait, which is slow if other "
            "programs are busy; import tinysd_batch first, or set OMP_WAIT_POLICY=PASSIVE"
        )


class limit_threads:  # noqa: N801 - used like a function, as contextlib's classes are
    """Limit torch to `count` threads (None: no limit), and restore the number at the end."""

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.before: int | None = None

    def __enter__(self) -> None:
        import torch

        before = torch.get_num_threads()
        if self.count is not None and before > self.count:
            self.before = before
            torch.set_num_threads(self.count)

    def __exit__(self, *exception: object) -> None:
        import torch

        if self.before is not None:
            torch.set_num_threads(self.before)


def count_usable_cores() -> int:
    """Return how many cores this process may use. In a container that may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
