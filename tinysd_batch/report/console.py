"""Make every console of the program, and decide what to believe of the terminal it writes to.

Docker and CI runners set `COLUMNS=0`, new pseudo-terminals report a width of 0, and rich then prints nothing at all.
"""

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console, ConsoleDimensions

MIN_COLUMNS, DEFAULT_COLUMNS = 20, 80
MIN_LINES, DEFAULT_LINES = 5, 25
MAX_CONSOLE_SIDE = 10_000
MIN_COLUMNS_FOR_BAR = 90  # narrower terminals show the numbers of a progress alone


class MinimumSizeConsole(Console):
    """A console that never takes a terminal for narrower or lower than text can be read on."""

    @property
    def size(self) -> ConsoleDimensions:
        found = super().size
        return ConsoleDimensions(
            side_or_default(found.width, MIN_COLUMNS, DEFAULT_COLUMNS),
            side_or_default(found.height, MIN_LINES, DEFAULT_LINES),
        )

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self.width, self.height = new_size


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """The console of a command. Colours and escapes only go to real terminals, whatever FORCE_COLOR says."""
    stream = sys.stderr if stderr else sys.stdout
    return MinimumSizeConsole(
        stderr=stderr, quiet=quiet, highlight=False, force_terminal=is_terminal(stream),
        _environ=drop_invalid_sizes(os.environ),
    )  # fmt: skip


def has_live_display(console: Console) -> bool:
    """Whether lines on it can be redrawn; plain lines are printed where they cannot."""
    return console.is_terminal and not console.is_dumb_terminal


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def drop_invalid_sizes(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without a COLUMNS or LINES that is no usable number, so that the terminal itself is asked."""
    least = {"COLUMNS": MIN_COLUMNS, "LINES": MIN_LINES}
    return {
        name: value for name, value in environment.items() if name not in least or is_valid_side(value, least[name])
    }


def is_valid_side(text: str, least: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 6 and least <= int(text) <= MAX_CONSOLE_SIDE


def side_or_default(found: int, least: int, default: int) -> int:
    return found if least <= found <= MAX_CONSOLE_SIDE else default
