"""Check the image files of a job against its results table, and the table for consistency. Writes nothing."""

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from operator import itemgetter
from pathlib import Path

import pyarrow as pa

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.job.results.compare import (
    IMAGES_FOLDER,
    ComparedFile,
    FileState,
    compare_folders,
    is_majority,
    list_file_sizes,
)
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job import STATE_FOLDER
from tinysd_batch.records import Status
from tinysd_batch.storage.lock import is_locked

VERIFIED_COLUMNS = ["row", "index", "status", "file_name", "sha256", "bytes"]
BLOCK_BYTES = 1 << 20
READ_ATTEMPTS = 5


class VerificationProblem(StrEnum):
    """What can be wrong with a file or a row."""

    MISSING = "missing"
    SHORTER = "shorter"
    CHANGED = "changed"
    NO_FILE = "no_file"
    OUTSIDE = "outside"
    UNREADABLE = "unreadable"
    EXTRA = "extra"
    DOUBLED = "doubled"
    UNKNOWN_STATUS = "unknown_status"
    NO_HASH = "no_hash"


PROBLEM_BY_STATE = {
    FileState.MISSING: VerificationProblem.MISSING,
    FileState.SHORTER: VerificationProblem.SHORTER,
    FileState.LARGER: VerificationProblem.CHANGED,
    FileState.NO_FILE: VerificationProblem.NO_FILE,
    FileState.OUTSIDE: VerificationProblem.OUTSIDE,
}


@dataclass(slots=True)
class Verification:
    """Result of verifying a job: counts, and the names of all files and rows with a problem."""

    images: int = 0  # rows whose image was saved
    unsaved: int = 0  # rows of images that were not saved (--skip_save)
    failed_or_invalid: int = 0  # rows of images that failed, and invalid rows
    running: bool = False  # another process is running the job, so its newest files have no row yet
    problems: dict[VerificationProblem, list[str]] = field(
        default_factory=lambda: {problem: [] for problem in VerificationProblem}
    )

    @property
    def is_intact(self) -> bool:
        """Whether there are no problems."""
        return not any(self.problems.values())

    @property
    def is_mostly_missing(self) -> bool:
        """Whether more than half of the image files are missing."""
        return is_majority(len(self.problems[VerificationProblem.MISSING]), self.images)


def verify_job(job_folder: Path, on_image: Callable[[int, int], None]) -> Verification:
    """Check the table and every image file.

    Args:
        job_folder: The job's folder.
        on_image: Called after each image with the number of checked images and the total.

    Raises:
        UsageError: There is no results table.
        StorageError: The table or a folder cannot be read.
    """
    results = ResultsTable(job_folder)
    if not results.sealed_files() and not results.journal_parts():
        raise UsageError(f"{job_folder}: has no results to verify; name the folder that submit printed")
    verification = Verification(running=is_locked(job_folder / STATE_FOLDER / "lock"))
    saved = check_rows(read_table_with_retries(results), verification)
    hashes = {index: sha256 for index, _, _, sha256 in saved}
    verification.images = len(saved)
    checked = 0
    compared_folders: set[str] = set()
    for folder in compare_folders(job_folder, (image[:3] for image in sorted(saved, key=itemgetter(1)))):
        for file in folder.files:
            compared_folders.add(file.file_name.rpartition("/")[0])
            check_file(job_folder, file, hashes[file.image_index], verification)
            checked += 1
            on_image(checked, verification.images)
        add_extra_files(verification, folder.extra)
    add_extra_files(verification, find_unlisted_files(job_folder, compared_folders))
    return verification


def read_table_with_retries(results: ResultsTable) -> pa.Table:
    """Read the table, trying again if a running driver replaces its files at the same time."""
    for attempt in range(READ_ATTEMPTS):
        try:
            return results.read_newest(VERIFIED_COLUMNS)
        except StorageError:
            if attempt + 1 == READ_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def check_rows(table: pa.Table, verification: Verification) -> list[tuple[int, str, int | None, str | None]]:
    """Check the rows; return index, file name, bytes and SHA-256 of the images that were saved."""
    saved: list[tuple[int, str, int | None, str | None]] = []
    indexes: Counter[int] = Counter()
    names: Counter[str] = Counter()
    for row, index, status, name, sha256, size in zip(
        *(table[column].to_pylist() for column in VERIFIED_COLUMNS), strict=True
    ):
        label = f"row {row}" if index is None else f"image {index}"
        if status not in set(Status):
            verification.problems[VerificationProblem.UNKNOWN_STATUS].append(f"{label}: {status}")
        if index is not None:
            indexes[index] += 1
        if status != Status.OK:
            verification.failed_or_invalid += 1
        elif name is None or index is None:
            verification.unsaved += 1
        else:
            names[name] += 1
            saved.append((index, name, size, sha256))
    doubled = verification.problems[VerificationProblem.DOUBLED]
    doubled += [f"image {index}: {count} rows" for index, count in indexes.items() if count > 1]
    doubled += [f"{name}: {count} rows" for name, count in names.items() if count > 1]
    return saved


def check_file(job_folder: Path, file: ComparedFile, sha256: str | None, verification: Verification) -> None:
    """Add a file to the problems if it differs from its row; its content is read unless its size already differs."""
    problem = PROBLEM_BY_STATE.get(file.state)
    if problem is None and sha256 is None:
        problem = VerificationProblem.NO_HASH
    if problem is None:
        try:
            problem = None if hash_file(job_folder / file.file_name) == sha256 else VerificationProblem.CHANGED
        except OSError as error:
            verification.problems[VerificationProblem.UNREADABLE].append(f"{file.file_name}: {error.strerror or error}")
            return
    if problem is not None:
        verification.problems[problem].append(file.file_name)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file. Raises OSError, also for a symbolic link."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123 - pathlib cannot open a file descriptor
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def find_unlisted_files(job_folder: Path, compared_folders: set[str]) -> Iterator[str]:
    """Yield files in `images/` that are not in a compared folder: those at its top, and those of other folders."""
    for name in sorted(list_file_sizes(job_folder / IMAGES_FOLDER)):
        folder = f"{IMAGES_FOLDER}/{name}"
        path = job_folder / folder
        if folder in compared_folders:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from (f"{folder}/{file}" for file in sorted(list_file_sizes(path)))
        else:
            yield folder


def add_extra_files(verification: Verification, names: Iterable[str]) -> None:
    """Add files without a row to the problems, unless the job is running."""
    if not verification.running:
        verification.problems[VerificationProblem.EXTRA] += names
