"""Calls into Ray that come back in any case: some wait for ever for a process that is no more."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tinysd_batch.errors import NoWorkerError

ReturnValue = TypeVar("ReturnValue")
CALL_TIMEOUT_S = 20.0  # for a call that takes milliseconds


class RayLostError(NoWorkerError):
    """Ray, or the part of it that this process talks to, does not answer any more."""


class BoundedCaller:
    """Makes calls in a thread of its own, one at a time, so that the caller can give up waiting.

    A thread that hangs is left alone; it ends with the process.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Any] | None = None

    def __call__(self, function: Callable[[], ReturnValue], limit_s: float = CALL_TIMEOUT_S) -> ReturnValue:
        """The function's answer, or its exception. Raises RayLostError where neither comes in time."""
        if self.calls is None:
            self.calls = queue.SimpleQueue()
            threading.Thread(target=run_calls, args=(self.calls,), name="ray-calls", daemon=True).start()
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.calls.put((function, answers))
        try:
            answer, error = answers.get(timeout=limit_s)
        except queue.Empty:
            self.abandon_thread()
            raise RayLostError(f"Ray did not answer for {limit_s:,.0f} s") from None
        except BaseException:  # a second Ctrl-C: the call goes on, and nobody waits for it
            self.abandon_thread()
            raise
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]

    def abandon_thread(self) -> None:
        """Let the thread end once it comes back."""
        if self.calls is not None:
            self.calls.put(None)
            self.calls = None


def run_calls(calls: "queue.SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        function, answers = call
        try:
            answers.put((function(), None))
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            answers.put((None, error))
        del call, function, answers
