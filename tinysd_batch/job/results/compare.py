"""Compare the results table with the image files on disk, by name and size.

The one comparison behind `submit`, `plan --reuse`, `status` and `verify`. Each folder is listed once; no file is opened
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
from tinysd_batch.storage.atomic import storage_errors

IMAGES_FOLDER = "images"
FOLDER_NAME = re.compile(rf"{IMAGES_FOLDER}/\d{{5,12}}", re.ASCII)
COMPARED_COLUMNS = ["row", "index", "status", "file_name", "bytes", "run_id"]
BATCH_ROWS = 10_000
MAX_NAMED_FILES = 3  # in a message
SavedImage = tuple[int, str, int | None]  # index, file name, bytes as the table has them


class FileState(StrEnum):
    """How a file on disk compares with its row."""

    SAME_SIZE = "same_size"
    LARGER = "larger"
    SHORTER = "shorter"  # an empty file, too
    MISSING = "missing"
    NO_FILE = "no_file"  # a folder, link or other thing has the file's name
    OUTSIDE = "outside"  # the table names a path that no image of a job has


class ComparedFile(NamedTuple):
    """An image that the table says was saved. A million of them are made at a time."""

    image_index: int  # its index
    file_name: str  # relative to the job folder
    state: FileState


@dataclass(frozen=True, slots=True)
class ComparedFolder:
    """One folder of images."""

    files: list[ComparedFile]
    extra: list[str]  # names relative to the job folder that are on disk and not in the table


def read_saved_images(job_folder: Path) -> pa.Table:
    """The newest rows of the images that were saved. Raises StorageError."""
    table = ResultsTable(job_folder).read_newest(COMPARED_COLUMNS)
    is_saved = pc.and_(pc.equal(table["status"], str(Status.OK)), pc.is_valid(table["file_name"]))
    return table.filter(pc.and_(is_saved, pc.is_valid(table["index"])))


def iterate_saved_images(table: pa.Table) -> Iterator[SavedImage]:
    """Index, file name and bytes, folder by folder; few of them are Python objects at a time."""
    columns = table.select(["index", "file_name", "bytes"]).sort_by("file_name")
    for batch in columns.to_batches(BATCH_ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def compare_folders(job_folder: Path, images: Iterable[SavedImage]) -> Iterator[ComparedFolder]:
    """Compare images (index, file name, bytes), which come folder by folder, with the disk.

    Raises StorageError where a folder cannot be read.
    """
    for folder, group in groupby(images, lambda image: image[1].rpartition("/")[0]):
        images_here = list(group)
        if FOLDER_NAME.fullmatch(folder) is None:
            yield ComparedFolder([ComparedFile(index, name, FileState.OUTSIDE) for index, name, _ in images_here], [])
            continue
        sizes = list_file_sizes(job_folder / folder)
        start = len(folder) + 1
        files = [
            ComparedFile(index, name, compare_size(sizes.get(name[start:]), expected or 0))
            for index, name, expected in images_here
        ]
        extra = sizes.keys() - {name[start:] for _, name, _ in images_here}
        yield ComparedFolder(files, [f"{folder}/{name}" for name in sorted(extra)])


def compare_size(size: int | None, expected: int) -> FileState:
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
    """Size of each file in a folder by name, -1 for what is no file; nothing where there is no such folder.

    Raises StorageError where the folder cannot be read: what cannot be seen is not missing.
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
                except FileNotFoundError:  # deleted meanwhile
                    continue
    return sizes


STATE_TEXTS = {
    FileState.MISSING: "missing",
    FileState.SHORTER: "shorter than the table says",
    FileState.NO_FILE: "no regular file",
    FileState.OUTSIDE: "outside of the images folder",
}


@dataclass(slots=True)
class FileDifferences:
    """Images to generate again, because their files are not what the table says."""

    images: int = 0  # that were saved
    indexes: set[int] = field(default_factory=set)
    counts: Counter[FileState] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)  # of the first few

    def add(self, file: ComparedFile) -> None:
        self.images += 1
        if file.state in STATE_TEXTS:
            self.indexes.add(file.image_index)
            self.counts[file.state] += 1
            if len(self.names) < MAX_NAMED_FILES:
                self.names.append(file.file_name)

    @property
    def is_mostly_missing(self) -> bool:
        return is_majority(self.counts[FileState.MISSING], self.images)

    @property
    def advice(self) -> str:
        if self.is_mostly_missing:
            return "is a disk not mounted? Submit with --redo-missing generates them again"
        return "submit generates them again"

    def __str__(self) -> str:
        """`of 80 image files 2 are missing, 1 is shorter than the table says (images/00000/seed_5_00001.png, ...)`"""
        parts = [f"{self.counts[state]:,} {is_or_are(self.counts[state])} {words}" for state, words in STATE_TEXTS.items()
                 if self.counts[state]]  # fmt: skip
        more = ", ..." if len(self.indexes) > len(self.names) else ""
        files = "file" if self.images == 1 else "files"
        return f"of {self.images:,} image {files} {', '.join(parts)} ({', '.join(self.names)}{more})"


def is_majority(missing: int, images: int) -> bool:
    return 2 * missing > images


def is_or_are(number: int) -> str:
    return "is" if number == 1 else "are"


def find_differences(job_folder: Path, run_id: str | None = None) -> FileDifferences:
    """Compare a job's table with the disk. With `run_id`, only the folders that this run wrote to.

    Raises StorageError.
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
    """The images that lie in a folder of a chosen one."""
    folders = pc.replace_substring_regex(images["file_name"], "/[^/]*$", "")
    return images.filter(pc.is_in(folders, pc.unique(folders.filter(chosen))))


def find_images_to_redo(job_folder: Path, redo_missing: bool) -> FileDifferences:
    """Images of earlier runs whose files are missing or damaged.

    Raises:
        StorageError: More than half of the files are missing, and `redo_missing` does not say that they are gone.
    """
    differences = find_differences(job_folder)
    if differences.is_mostly_missing and not redo_missing:
        raise StorageError(
            f"{job_folder / IMAGES_FOLDER}: {differences}; if a disk is not mounted, mount it and submit again; "
            f"if they are gone, --redo-missing generates them again"
        )
    return differences
