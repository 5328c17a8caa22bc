"""Format numbers, durations and text for people."""

from typing import TYPE_CHECKING

from tinysd_batch.text import make_printable

if TYPE_CHECKING:
    from rich.console import Console


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Return `1 image`, `12,345 images`."""
    return f"{number:,} " + (singular if number == 1 else plural or f"{singular}s")


def format_row_label(row: int, line: int | None = None) -> str:
    """Return `row 7 (line 8)`: a row of the manifest, and its line in a spreadsheet or an editor."""
    return f"row {row}" if line is None else f"row {row} (line {line})"


def format_bytes(n_bytes: int) -> str:
    """Return `812 bytes`, `45 kB`, `1.2 GB`."""
    amount, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}" if unit != "bytes" and amount < 10 else f"{amount:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return `8 s`, `3 min 5 s`, `2 h 10 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def format_clock(seconds: float) -> str:
    """Return `0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def to_one_line(text: str, max_characters: int = 60) -> str:
    """Make text from a manifest safe for a terminal: one line, no control characters, not too long."""
    printable = make_printable(text)
    return printable if len(printable) <= max_characters else printable[: max_characters - 1] + "…"


def print_line(console: "Console", line: str) -> None:
    """Print a line literally: no markup, no colours, and no characters that move the cursor."""
    from rich.text import Text

    console.print(Text(make_printable(line)), soft_wrap=True)
