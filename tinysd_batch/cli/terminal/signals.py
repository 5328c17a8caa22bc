"""Handle signals: the first Ctrl-C finishes the images in progress, the second exits at once."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING_MESSAGE = b"\nStopping after the images in progress; press Ctrl-C again to exit at once.\n"


class StopRequest:
    """Remember whether, and by which signal, the run was asked to stop.

    After SIGHUP, output to the closed terminal is discarded.
    """

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
            # A handler must not print: it may have interrupted a print.
            os.write(get_stderr_descriptor(), STOPPING_MESSAGE)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a stop request.

    A closed ssh session sends SIGHUP; it stays ignored if nohup made it so.
    """
    request = StopRequest()
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    previous = {number: signal.signal(number, request.handle_signal) for number in signals}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def get_stderr_descriptor() -> int:
    """Return the descriptor of stderr, which is not 2 while Ray runs: 2 is then the job's log."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


def redirect_to_devnull(streams: list[int]) -> None:
    """Discard output to these descriptors: writing to a closed terminal would raise an error."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(devnull, stream)
    os.close(devnull)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that partial files are cleaned up."""

    def handle_sigterm(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, handle_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
