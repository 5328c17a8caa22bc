"""Compare the results table with the image files on disk, by name and size.

`submit`, `plan --reuse`, `status` and `verify` all use this comparison. Each folder is listed once; no file is opened
and no symbolic link is followed.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from tinysd_batch.errors import StorageError
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.records import Status
from tinysd_batch.storage.filesystem import storage_errors

IMAGES_FOLDER = "images"
FOLDER_NAME = re.compile(rf"{IMAGES_FOLDER}/\d{{5,12}}", re.ASCII)
COMPARED_COLUMNS = ["row", "index", "status", "file_name", "bytes", "run_id"]
BATCH_ROWS = 10_000
MAX_NAMED_FILES = 3  # in a message
SavedImage = tuple[int, str, int | None]  # index, file name, bytes in the table


class FileState(StrEnum):
    """How a file on disk compares with its row."""

    SAME_SIZE = "same_size"
    LARGER = "larger"
    SHORTER = "shorter"  # also an empty file
    MISSING = "missing"
    NO_FILE = "no_file"  # a folder, symbolic link or special file has the file's name
    OUTSIDE = "outside"  # the table has a path that an image cannot have


class ComparedFile(NamedTuple):
    """An image that the table records as saved. A named tuple, since a job may have millions."""

    image_index: int
    file_name: str  # relative to the job folder
    state: FileState


@dataclass(frozen=True, slots=True)
class ComparedFolder:
    """Result of comparing one folder of images."""

    files: list[ComparedFile]
    extra: list[str]  # files that are not in the table, relative to the job folder


def read_saved_images(job_folder: Path) -> pa.Table:
    """Read the newest rows of the images that were saved. Raises StorageError."""
    table = ResultsTable(job_folder).read_newest(COMPARED_COLUMNS)
    is_saved = pc.and_(pc.equal(table["status"], str(Status.OK)), pc.is_valid(table["file_name"]))
    return table.filter(pc.and_(is_saved, pc.is_valid(table["index"])))


def iterate_saved_images(table: pa.Table) -> Iterator[SavedImage]:
    """Yield index, file name and bytes, folder by folder, converting few rows to Python objects at a time."""
    columns = table.select(["index", "file_name", "bytes"]).sort_by("file_name")
    for batch in columns.to_batches(BATCH_ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def compare_folders(job_folder: Path, images: Iterable[SavedImage]) -> Iterator[ComparedFolder]:
    """Compare images with the disk.

    Args:
        job_folder: The job's folder.
        images: Index, file name and bytes of each image, grouped by folder.

    Raises:
        StorageError: A folder cannot be read.
    """
    for folder, group in groupby(images, lambda image: image[1].rpartition("/")[0]):
        group_images = list(group)
        if FOLDER_NAME.fullmatch(folder) is None:
            yield ComparedFolder([ComparedFile(index, name, FileState.OUTSIDE) for index, name, _ in group_images], [])
            continue
        sizes = list_file_sizes(job_folder / folder)
        start = len(folder) + 1
        files = [
            ComparedFile(index, name, compare_size(sizes.get(name[start:]), expected or 0))
            for index, name, expected in group_images
        ]
        extra = sizes.keys() - {name[start:] for _, name, _ in group_images}
        yield ComparedFolder(files, [f"{folder}/{name}" for name in sorted(extra)])


def compare_size(size: int | None, expected: int) -> FileState:
    """Compare a size that `list_file_sizes` returned, None for a missing file, with the one in the table."""
    if size == expected and size:
        return FileState.SAME_SIZE
    if size is None:
        return FileState.MISSING
    if size < 0:
        return FileState.NO_FILE
    if size < max(expected, 1):
        return FileState.SHORTER
    return FileState.LARGER


def list_file_sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file in a folder by name, and -1 for anything else; empty if there is no such folder.

    Raises:
        StorageError: The folder cannot be read. Its files must not count as missing then.
    """
    sizes: dict[str, int] = {}
    if folder.is_symlink() or folder.parent.is_symlink():
        return sizes
    with storage_errors(folder):
        try:
            entries = os.scandir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return sizes
        with entries:
            for entry in entries:
                try:
                    is_file = entry.is_file(follow_symlinks=False)
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size if is_file else -1
                except FileNotFoundError:  # deleted since the folder was listed
                    continue
    return sizes


STATE_TEXTS = {
    FileState.MISSING: "missing",
    FileState.SHORTER: "shorter than the table says",
    FileState.NO_FILE: "not a regular file",
    FileState.OUTSIDE: "outside the images folder",
}


@dataclass(slots=True)
class FileDifferences:
    """Images to generate again because their files differ from the table."""

    images: int = 0  # number of saved images that were compared
    indexes: set[int] = field(default_factory=set)
    counts: Counter[FileState] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)  # file names of the first few

    def add(self, file: ComparedFile) -> None:
        self.images += 1
        if file.state in STATE_TEXTS:
            self.indexes.add(file.image_index)
            self.counts[file.state] += 1
            if len(self.names) < MAX_NAMED_FILES:
                self.names.append(file.file_name)

    @property
    def is_mostly_missing(self) -> bool:
        """Whether more than half of the files are missing, as if a disk were not mounted."""
        return is_majority(self.counts[FileState.MISSING], self.images)

    @property
    def advice(self) -> str:
        """What the user can do about the differences."""
        if self.is_mostly_missing:
            return "mount the disk if it is not mounted; otherwise submit --redo-missing generates them again"
        return "submit generates them again"

    def __str__(self) -> str:
        """Return `of 80 image files 2 are missing, 1 is shorter than the table says (images/00000/x.png, ...)`."""
        counts = [(self.counts[state], text) for state, text in STATE_TEXTS.items() if self.counts[state]]
        parts = [f"{count:,} {is_or_are(count)} {text}" for count, text in counts]
        more = ", ..." if len(self.indexes) > len(self.names) else ""
        files = "file" if self.images == 1 else "files"
        return f"of {self.images:,} image {files} {', '.join(parts)} ({', '.join(self.names)}{more})"


def is_majority(missing: int, images: int) -> bool:
    """Whether `missing` is more than half of `images`."""
    return 2 * missing > images


def is_or_are(number: int) -> str:
    return "is" if number == 1 else "are"


def find_differences(job_folder: Path, run_id: str | None = None) -> FileDifferences:
    """Compare a job's table with the disk.

    Args:
        job_folder: The job's folder.
        run_id: Compare only the folders that this run wrote to.

    Raises:
        StorageError: The table or a folder cannot be read.
    """
    images = read_saved_images(job_folder)
    if run_id is not None:
        images = select_same_folders(images, pc.equal(images["run_id"], run_id))
    differences = FileDifferences()
    for folder in compare_folders(job_folder, iterate_saved_images(images)):
        for file in folder.files:
            differences.add(file)
    return differences


def select_same_folders(images: pa.Table, chosen: pa.ChunkedArray) -> pa.Table:
    """Select the images that are in the same folder as a chosen one. `chosen` is a boolean column."""
    folders = pc.replace_substring_regex(images["file_name"], "/[^/]*$", "")
    return images.filter(pc.is_in(folders, pc.unique(folders.filter(chosen))))


def find_images_to_redo(job_folder: Path, redo_missing: bool) -> FileDifferences:
    """Find images of earlier runs whose files are missing or damaged.

    Raises:
        StorageError: More than half of the files are missing and `redo_missing` is False, or they cannot be compared.
    """
    differences = find_differences(job_folder)
    if differences.is_mostly_missing and not redo_missing:
        raise StorageError(
            f"{job_folder / IMAGES_FOLDER}: {differences}; if a disk is not mounted, mount it and submit again; "
            f"if they were deleted, --redo-missing generates them again"
        )
    return differences
