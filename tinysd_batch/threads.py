"""How the threads of torch wait for each other, decided before torch is imported.

Loaded with the package, before the current folder is off the import path: imports only what Python has loaded itself.

A thread of GNU's OpenMP that has finished its part of a parallel region spins for several milliseconds, waiting for the
others. Beside another busy program one of them is often suspended meanwhile, and the spinning ones use up the time that
it needs: everything takes 5 to 20 times as long. Threads that sleep at once cost an idle machine more, since they are
woken thousands of times in each step of a large model. So they spin for a moment (70 microseconds on a Zen 5, 140 on
recent Intel cores), which bridges the gap from one operation to the next, and sleep then.
"""

import os
import sys

# libgomp, which the wheels of torch contain, reads both. libomp and libiomp read the first, and sleep at once.
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
WAIT_POLICY_VARIABLES = {*WAIT_POLICY, "KMP_BLOCKTIME", "KMP_LIBRARY"}

was_torch_imported_first = False  # torch was imported before this package, so that OpenMP has not read our variables


def set_wait_policy() -> None:
    """Let waiting threads sleep soon, unless the user has chosen how they wait."""
    global was_torch_imported_first
    if WAIT_POLICY_VARIABLES.isdisjoint(os.environ):
        os.environ.update(WAIT_POLICY)
        was_torch_imported_first = "torch" in sys.modules


def warn_if_threads_spin(count: int) -> None:
    """Log what to do where `count` threads will compute and OpenMP did not see the wait policy."""
    import logging

    if was_torch_imported_first and count > 1:
        logging.getLogger(__name__).warning(
            "torch was imported before tinysd_batch, so its threads spin while they wait, which is slow beside other "
            "busy programs; import tinysd_batch first, or set OMP_WAIT_POLICY=PASSIVE"
        )


class limit_threads:  # noqa: N801 - used as a function, as contextlib's are
    """Let torch compute on at most `count` threads, any number for None, and restore the number afterwards."""

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
    """Cores this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
