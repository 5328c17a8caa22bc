"""What `verify` prints."""

import time
from typing import Any

from rich.console import Console

from tinysd_batch.job.verify import Problem, Verification
from tinysd_batch.report.formatting import count, one_line, say

SHOWN = 5  # names of each kind
PROGRESS_AFTER_S = 2.0
PROGRESS_EVERY_S = 10.0
WORDS = {
    Problem.MISSING: "missing",
    Problem.SHORTER: "shorter than the table says, or empty",
    Problem.CHANGED: "changed: not the bytes that the table has the SHA-256 of",
    Problem.NO_FILE: "no regular file: a folder or a link, say",
    Problem.OUTSIDE: "named by the table outside of images/",
    Problem.UNREADABLE: "cannot be read",
    Problem.EXTRA: "in images/ but not in the table",
    Problem.DOUBLED: "in several rows of the table",
    Problem.UNKNOWN_STATUS: "rows with an unknown status",
    Problem.NO_HASH: "without a SHA-256 in the table",
}
ADVICE = {
    Problem.MISSING: "submit generates missing and shorter files again",
    Problem.SHORTER: "submit generates missing and shorter files again",
    Problem.CHANGED: "submit leaves changed files alone: delete them to have them generated again",
    Problem.EXTRA: "submit takes over images that a killed run left without a row",
}


class VerifyProgress:
    """A line now and then while many files are read."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.next_line = time.monotonic() + PROGRESS_AFTER_S

    def image(self, checked: int, images: int) -> None:
        now = time.monotonic()
        if now >= self.next_line and checked < images:
            self.next_line = now + PROGRESS_EVERY_S
            say(self.console, f"{checked:,} of {count(images, 'image')} checked")


def print_verification(job: str, found: Verification, console: Console) -> None:
    rest = f", {found.unmade:,} failed or invalid" if found.unmade else ""
    rest += f", {found.unsaved:,} not saved" if found.unsaved else ""
    say(console, f"{job}: {count(found.images, 'image')} checked{rest}")
    if found.running:
        say(console, "The job is running: files that are not in the table yet are not listed")
    for problem, names in found.problems.items():
        if names:
            print_names(WORDS[problem], names, console)
    if found.is_right:
        say(console, "All files are as the table says")
    print_advice(found, console)


def print_advice(found: Verification, console: Console) -> None:
    for advice in dict.fromkeys(ADVICE[problem] for problem in ADVICE if found.problems[problem]):
        say(console, f"{advice[0].upper()}{advice[1:]}")
    if found.is_mostly_missing:
        say(console, "More than half are missing: submit asks for --redo-missing, since a disk may not be mounted")


def print_names(what: str, names: list[str], console: Console) -> None:
    say(console, f"{len(names):,} {what}:")
    for name in names[:SHOWN]:
        say(console, f"  {one_line(name, 300)}")
    if len(names) > SHOWN:
        say(console, f"  and {len(names) - SHOWN:,} more; --json names them all")


def verification_as_dict(found: Verification) -> dict[str, Any]:
    return {
        "images": found.images,
        "unsaved": found.unsaved,
        "unmade": found.unmade,
        "running": found.running,
        "is_right": found.is_right,
        **{str(problem): names for problem, names in found.problems.items()},
    }
