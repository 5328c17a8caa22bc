"""Words for people: counts, times, one-line texts."""

from tinysd_batch.records import Status

PROBLEMS = (Status.FAILED, Status.INVALID, Status.QUARANTINED)


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """`8 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def one_line(text: str, length: int = 60) -> str:
    """Text that came with a manifest, fit for a terminal: no control characters, not too long."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
