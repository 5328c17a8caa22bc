"""Call Ray with a timeout, because some of its calls wait forever for a process that has ended."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tinysd_batch.errors import NoWorkerError

ReturnValue = TypeVar("ReturnValue")
CALL_TIMEOUT_S = 20.0  # for a call that takes milliseconds


class RayLostError(NoWorkerError):
    """Ray, or the part of it that this process talks to, no longer answers."""


class BoundedCaller:
    """Makes calls in a thread of its own, one at a time, so that the caller can stop waiting.

    A thread that hangs is abandoned. It ends with the process.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Any] | None = None

    def __call__(self, function: Callable[[], ReturnValue], timeout_s: float = CALL_TIMEOUT_S) -> ReturnValue:
        """Return the function's value, or raise its exception. Raises RayLostError on a timeout."""
        if self.calls is None:
            self.calls = queue.SimpleQueue()
            threading.Thread(target=run_calls, args=(self.calls,), name="ray-calls", daemon=True).start()
        outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.calls.put((function, outcomes))
        try:
            value, error = outcomes.get(timeout=timeout_s)
        except queue.Empty:
            self.abandon_thread()
            raise RayLostError(f"Ray did not answer for {timeout_s:,.0f} s") from None
        except BaseException:  # a second Ctrl-C: the call goes on, but its caller no longer waits
            self.abandon_thread()
            raise
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def abandon_thread(self) -> None:
        """Let the thread end after its current call."""
        if self.calls is not None:
            self.calls.put(None)
            self.calls = None


def run_calls(calls: "queue.SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        function, outcomes = call
        try:
            outcomes.put((function(), None))
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            outcomes.put((None, error))
        del call, function, outcomes
