"""Words for people: counts, times, one-line texts."""

from typing import TYPE_CHECKING

from tinysd_batch.records import Status
from tinysd_batch.text import make_printable

if TYPE_CHECKING:
    from rich.console import Console

PROBLEMS = (Status.FAILED, Status.INVALID, Status.QUARANTINED)


def count(number: int, thing: str, things: str = "") -> str:
    return f"{number:,} " + (thing if number == 1 else things or f"{thing}s")


def format_row_label(number: int, line: int | None = None) -> str:
    """`row 7 (line 8)`: a row of the manifest, and where a spreadsheet or an editor shows it."""
    return f"row {number}" if line is None else f"row {number} (line {line})"


def format_bytes(number: int) -> str:
    """`812 bytes`, `45 kB`, `1.2 GB`."""
    amount, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}" if unit != "bytes" and amount < 10 else f"{amount:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def to_one_line(text: str, length: int = 60) -> str:
    """Text that came with a manifest, fit for a terminal: no control characters, not too long."""
    shown = make_printable(text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def print_line(console: "Console", line: str) -> None:
    """Print a line as it is: no markup, no colours, and nothing in it that moves the terminal."""
    from rich.text import Text

    console.print(Text(make_printable(line)), soft_wrap=True)
