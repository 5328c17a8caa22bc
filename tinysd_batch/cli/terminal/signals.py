"""Ctrl-C once finishes what is in flight; twice leaves at once."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING_MESSAGE = b"\nStopping when the pictures in work are done; a second time leaves at once.\n"


class StopRequest:
    """Whether, and by which signal, the run was asked to stop. A terminal that is gone gets no more output."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or 0)

    def handle_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:
            redirect_to_devnull([stream if stream == 1 else get_stderr_descriptor() for stream in self.terminals])
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(OSError):
            os.write(
                get_stderr_descriptor(), STOPPING_MESSAGE
            )  # a handler may not print: it may have interrupted a print


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and, unless nohup had it ignored from the start, SIGHUP, which a closed ssh session sends."""
    request = StopRequest()
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, request.handle_signal) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def get_stderr_descriptor() -> int:
    """Not always 2, which is the job's log while Ray is up."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


def redirect_to_devnull(streams: list[int]) -> None:
    """Let output to these vanish: writing to a terminal that is closed is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream)
    os.close(nowhere)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM leave as an exit does, so that nothing half-written stays."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
