"""What `verify` prints."""

import time
from typing import Any

from rich.console import Console

from tinysd_batch.job.verify import Verification, VerificationProblem
from tinysd_batch.report.formatting import count, print_line, to_one_line

MAX_SHOWN_NAMES = 5  # names of each kind
PROGRESS_AFTER_S = 2.0
PROGRESS_EVERY_S = 10.0
PROBLEM_DESCRIPTIONS = {
    VerificationProblem.MISSING: "missing",
    VerificationProblem.SHORTER: "shorter than the table says, or empty",
    VerificationProblem.CHANGED: "changed: not the bytes that the table has the SHA-256 of",
    VerificationProblem.NO_FILE: "no regular file: a folder or a link, say",
    VerificationProblem.OUTSIDE: "named by the table outside of images/",
    VerificationProblem.UNREADABLE: "cannot be read",
    VerificationProblem.EXTRA: "in images/ but not in the table",
    VerificationProblem.DOUBLED: "in several rows of the table",
    VerificationProblem.UNKNOWN_STATUS: "rows with an unknown status",
    VerificationProblem.NO_HASH: "without a SHA-256 in the table",
}
ADVICE_BY_PROBLEM = {
    VerificationProblem.MISSING: "submit generates missing and shorter files again",
    VerificationProblem.SHORTER: "submit generates missing and shorter files again",
    VerificationProblem.CHANGED: "submit leaves changed files alone: delete them to have them generated again",
    VerificationProblem.EXTRA: "submit takes over images that a killed run left without a row",
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
            print_line(self.console, f"{checked:,} of {count(images, 'image')} checked")


def print_verification(job: str, found: Verification, console: Console) -> None:
    rest = f", {found.failed_or_invalid:,} failed or invalid" if found.failed_or_invalid else ""
    rest += f", {found.unsaved:,} not saved" if found.unsaved else ""
    print_line(console, f"{job}: {count(found.images, 'image')} checked{rest}")
    if found.running:
        print_line(console, "The job is running: files that are not in the table yet are not listed")
    for problem, names in found.problems.items():
        if names:
            print_names(PROBLEM_DESCRIPTIONS[problem], names, console)
    if found.is_intact:
        print_line(console, "All files are as the table says")
    print_advice(found, console)


def print_advice(found: Verification, console: Console) -> None:
    for advice in dict.fromkeys(ADVICE_BY_PROBLEM[problem] for problem in ADVICE_BY_PROBLEM if found.problems[problem]):
        print_line(console, f"{advice[0].upper()}{advice[1:]}")
    if found.is_mostly_missing:
        print_line(
            console, "More than half are missing: submit asks for --redo-missing, since a disk may not be mounted"
        )


def print_names(what: str, names: list[str], console: Console) -> None:
    print_line(console, f"{len(names):,} {what}:")
    for name in names[:MAX_SHOWN_NAMES]:
        print_line(console, f"  {to_one_line(name, 300)}")
    if len(names) > MAX_SHOWN_NAMES:
        print_line(console, f"  and {len(names) - MAX_SHOWN_NAMES:,} more; --json names them all")


def verification_as_dict(found: Verification) -> dict[str, Any]:
    return {
        "images": found.images,
        "unsaved": found.unsaved,
        "unmade": found.failed_or_invalid,
        "running": found.running,
        "is_right": found.is_intact,
        **{str(problem): names for problem, names in found.problems.items()},
    }
