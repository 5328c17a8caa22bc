"""Create the consoles of the program, and correct invalid sizes of their terminals.

Docker and CI runners set `COLUMNS=0`, and new pseudo-terminals report a width of 0. rich then prints nothing.
"""

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console, ConsoleDimensions

MIN_COLUMNS, DEFAULT_COLUMNS = 20, 80
MIN_LINES, DEFAULT_LINES = 5, 25
MAX_CONSOLE_SIDE = 10_000
PLAIN_LINE_INTERVAL_S = 10.0  # where lines cannot be redrawn
MIN_COLUMNS_FOR_BAR = 90  # narrower terminals show progress as numbers only


class MinimumSizeConsole(Console):
    """A console that replaces a terminal size too small to read by a default."""

    @property
    def size(self) -> ConsoleDimensions:
        reported = super().size
        return ConsoleDimensions(
            side_or_default(reported.width, MIN_COLUMNS, DEFAULT_COLUMNS),
            side_or_default(reported.height, MIN_LINES, DEFAULT_LINES),
        )

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self.width, self.height = new_size


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Create a command's console. Colours and escape sequences only go to terminals, even if FORCE_COLOR is set."""
    stream = sys.stderr if stderr else sys.stdout
    return MinimumSizeConsole(
        stderr=stderr,
        quiet=quiet,
        highlight=False,
        force_terminal=is_terminal(stream),
        _environ=drop_invalid_sizes(os.environ),
    )


def has_live_display(console: Console) -> bool:
    """Whether lines can be redrawn; otherwise progress is printed as plain lines."""
    return console.is_terminal and not console.is_dumb_terminal


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def drop_invalid_sizes(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without invalid COLUMNS and LINES, so that rich asks the terminal for its size."""
    minimum = {"COLUMNS": MIN_COLUMNS, "LINES": MIN_LINES}
    return {
        name: value for name, value in environment.items() if name not in minimum or is_valid_side(value, minimum[name])
    }


def is_valid_side(text: str, minimum: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 6 and minimum <= int(text) <= MAX_CONSOLE_SIDE


def side_or_default(side: int, minimum: int, default: int) -> int:
    return side if minimum <= side <= MAX_CONSOLE_SIDE else default
