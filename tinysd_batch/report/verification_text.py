"""Print the result of `verify`."""

import time
from typing import Any

from rich.console import Console

from tinysd_batch.job.verify import Verification, VerificationProblem
from tinysd_batch.report.formatting import format_count, print_line, to_one_line

MAX_SHOWN_NAMES = 5  # of each problem
PROGRESS_AFTER_S = 2.0
PROGRESS_INTERVAL_S = 10.0
PROBLEM_DESCRIPTIONS = {
    VerificationProblem.MISSING: "missing",
    VerificationProblem.SHORTER: "shorter than the table says, or empty",
    VerificationProblem.CHANGED: "changed: the SHA-256 differs from the table's",
    VerificationProblem.NO_FILE: "not a regular file, for example a folder or a link",
    VerificationProblem.OUTSIDE: "outside images/ according to the table",
    VerificationProblem.UNREADABLE: "cannot be read",
    VerificationProblem.EXTRA: "in images/ but not in the table",
    VerificationProblem.DOUBLED: "in several rows of the table",
    VerificationProblem.UNKNOWN_STATUS: "rows with an unknown status",
    VerificationProblem.NO_HASH: "without a SHA-256 in the table",
}
ADVICE_BY_PROBLEM = {
    VerificationProblem.MISSING: "submit generates missing and shorter files again",
    VerificationProblem.SHORTER: "submit generates missing and shorter files again",
    VerificationProblem.CHANGED: "submit does not touch changed files: delete them to generate them again",
    VerificationProblem.EXTRA: "submit adopts images that a killed run left without a row",
}


class VerifyProgress:
    """Prints a line every ten seconds while many files are read."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.next_line_at = time.monotonic() + PROGRESS_AFTER_S

    def on_image(self, checked: int, images: int) -> None:
        now = time.monotonic()
        if now >= self.next_line_at and checked < images:
            self.next_line_at = now + PROGRESS_INTERVAL_S
            print_line(self.console, f"{checked:,} of {format_count(images, 'image')} checked")


def print_verification(job: str, verification: Verification, console: Console) -> None:
    counts = f", {verification.failed_or_invalid:,} failed or invalid" if verification.failed_or_invalid else ""
    counts += f", {verification.unsaved:,} not saved" if verification.unsaved else ""
    print_line(console, f"{job}: {format_count(verification.images, 'image')} checked{counts}")
    if verification.running:
        print_line(console, "The job is running: files that are not in the table yet are not listed")
    for problem, names in verification.problems.items():
        if names:
            print_names(PROBLEM_DESCRIPTIONS[problem], names, console)
    if verification.is_intact:
        print_line(console, "All files match the table")
    print_advice(verification, console)


def print_advice(verification: Verification, console: Console) -> None:
    for advice in dict.fromkeys(
        advice for problem, advice in ADVICE_BY_PROBLEM.items() if verification.problems[problem]
    ):
        print_line(console, f"{advice[0].upper()}{advice[1:]}")
    if verification.is_mostly_missing:
        print_line(
            console, "More than half are missing: submit requires --redo-missing, because a disk may not be mounted"
        )


def print_names(description: str, names: list[str], console: Console) -> None:
    print_line(console, f"{len(names):,} {description}:")
    for name in names[:MAX_SHOWN_NAMES]:
        print_line(console, f"  {to_one_line(name, 300)}")
    if len(names) > MAX_SHOWN_NAMES:
        print_line(console, f"  and {len(names) - MAX_SHOWN_NAMES:,} more; --json lists all of them")


def verification_as_dict(verification: Verification) -> dict[str, Any]:
    return {
        "images": verification.images,
        "unsaved": verification.unsaved,
        "unmade": verification.failed_or_invalid,
        "running": verification.running,
        "is_right": verification.is_intact,
        **{str(problem): names for problem, names in verification.problems.items()},
    }
