"""Take finished pictures over from another job, where they would come out the same.

That is so where the `image_id` is the same and the file is what the other job's table says.
"""

import contextlib
import errno
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from tinysd_batch.config import Settings
from tinysd_batch.errors import OccupiedPathError, UsageError
from tinysd_batch.job.plan.batches import format_file_name
from tinysd_batch.job.results.compare import FileState, compare_folders
from tinysd_batch.job.results.rows import make_image_row
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.job.state.job import STATE_FOLDER, Job
from tinysd_batch.job.state.job_json import IMMUTABLE_SETTINGS
from tinysd_batch.job.state.open_job import JOB_FILE, read_reusable_job
from tinysd_batch.records import ImageRequest, ImageResult, Status
from tinysd_batch.storage.atomic import link_or_copy, read_file, storage_errors
from tinysd_batch.storage.filesystem import sync_path

IMAGES_PER_SYNC = 500  # pictures
REUSE_COLUMNS = ["row", "status", "image_id", "sha256", "bytes", "index", "seed", "file_name"]
FILE_SETTINGS = ("format", "quality", "no_metadata", "skip_save")
# What the new row says as the old one did: how the picture was made.
COPIED_COLUMNS = (
    "sha256", "bytes", "attempts", "degraded", "n_tokens", "truncated", "negative_truncated", "precision",
    "device_name", "worker", "node", "text_s", "denoise_s", "decode_s", "peak_memory_bytes", "started_at",
    "finished_at", "version",
)  # fmt: skip


class NoteSink(Protocol):
    """Who is told."""

    def note(self, line: str) -> None: ...


def reuse_images(
    job: Job, old: Path, wanted: Iterable[ImageRequest], writer: ResultsWriter, notes: NoteSink,
    should_stop: Callable[[], bool],
) -> set[int]:  # fmt: skip
    """Put the pictures of `old` that are among `wanted` into the job, with their rows; return their indexes.

    Where `old` is gone or was drawn otherwise, that is told, and everything is drawn. Raises JobLockedError while `old`
    runs, StorageError where its table or our disk fails.
    """
    try:
        saved = read_reusable_job(old, job.folder)
    except UsageError as error:
        notes.note(f"No more pictures are reused: {error}")
        return set()
    if job.seeds_from_table:
        lost = JOB_FILE if saved is None else f"rows in {STATE_FOLDER}"
        notes.note(f"{old} has lost its {lost}: images and seeds are taken over by its results table alone")
    taken: set[int] = set()
    broken = 0
    reason = find_incompatibility(job, saved)
    pairs = iter(()) if reason else find_reusable_rows(old, wanted, job.settings.format)
    while (group := list(islice(pairs, IMAGES_PER_SYNC))) and not should_stop():
        indexes = link_images(job, old, group, writer)
        broken += len(group) - len(indexes)
        taken |= indexes
        writer.flush_if_due()
    report_reuse(job, old, reason or describe_setting_differences(job, saved), len(taken), broken, notes)
    return taken


def report_reuse(job: Job, old: Path, why_none: str, taken: int, broken: int, notes: NoteSink) -> None:
    if taken:
        notes.note(f"Reused from {old}: {taken:,} image{'s' * (taken != 1)}")
    elif job.is_new:
        notes.note(f"Nothing can be reused from {old}: {why_none or 'no image is the same'}")
    if broken:
        notes.note(f"Drawn again: {broken:,} whose file in {old} is missing or not what its table says")


def find_incompatibility(job: Job, saved: dict[str, Any] | None) -> str:
    """Why no picture of the job that `saved` describes can be one of ours, where that is plain."""
    if saved is None:
        return ""
    if saved["model"]["digest"] != job.model.digest:
        return f"it was drawn by the model {saved['model']['name']}, and {job.model.name} has other weights"
    return describe_setting_differences(job, saved, FILE_SETTINGS)


def describe_setting_differences(
    job: Job, saved: dict[str, Any] | None, names: Iterable[str] = IMMUTABLE_SETTINGS
) -> str:
    """`steps: 20 there, 30 here`"""
    if saved is None:
        return ""
    return "; ".join(
        f"{name}: {was} there, {getattr(job.settings, name)} here"
        for name in names
        if (was := saved["settings"].get(name, Settings.model_fields[name].default)) != getattr(job.settings, name)
    )


def find_reusable_rows(
    old: Path, wanted: Iterable[ImageRequest], suffix: str
) -> Iterator[tuple[dict[str, Any], ImageRequest]]:
    """Rows of the old table, each with an image that is the same."""
    by_id: dict[str, list[ImageRequest]] = defaultdict(list)
    for request in wanted:
        by_id[request.image_id].append(request)
    for row in ResultsTable(old).read_rows(None):
        if is_reusable_row(row, suffix):
            for request in by_id.pop(row["image_id"], ()):
                yield row, request


def is_reusable_row(row: dict[str, Any], suffix: str) -> bool:
    """Whether a row of the old table names a file of this format."""
    has_all = None not in (row["sha256"], row["index"], row["seed"], row["file_name"])
    return row["status"] == Status.OK and has_all and str(row["file_name"]).endswith(f".{suffix}")


def count_reusable_images(job: Job, wanted: Mapping[str, int]) -> int:
    """How many images of the ids `wanted` (id -> how many images have it) the job's `reuse` has.

    Files are judged by name and size; `submit` reads them, too. Raises StorageError.
    """
    if job.reuse is None:
        return 0
    try:
        saved = read_reusable_job(job.reuse, job.folder)
    except UsageError:  # gone since the job began
        return 0
    if find_incompatibility(job, saved):
        return 0
    suffix = job.settings.format
    table = ResultsTable(job.reuse).read_newest(REUSE_COLUMNS)
    rows = [row for row in table.to_pylist() if row["image_id"] in wanted and is_reusable_row(row, suffix)]
    files = [(row["index"], format_file_name(row["seed"], row["index"], suffix), row["bytes"]) for row in rows]
    compared = (
        file for folder in compare_folders(job.reuse, sorted(files, key=itemgetter(1))) for file in folder.files
    )
    same = {file.image_index for file in compared if file.state is FileState.SAME_SIZE}
    return sum(wanted[image_id] for image_id in {row["image_id"] for row in rows if row["index"] in same})


def link_images(
    job: Job, old: Path, group: list[tuple[dict[str, Any], ImageRequest]], writer: ResultsWriter
) -> set[int]:
    """Take some pictures over; their rows may be written once the folders are synced."""
    good = [(row, request) for row, request in group if link_image(job, old, row, request, writer)]
    for folder in {(job.folder / request.file_name).parent for _, request in good}:
        with storage_errors(folder):
            sync_path(folder)
    for row, request in good:
        new = make_image_row(request, ImageResult(request.index, Status.OK), job.run_columns())
        made = {name: row[name] for name in COPIED_COLUMNS}
        writer.append(new | made | {"file_name": request.file_name, "reused": str(old)})
    return {request.index for _, request in good}


def link_image(job: Job, old: Path, row: dict[str, Any], request: ImageRequest, writer: ResultsWriter) -> bool:
    """Share the picture's file, if it is what the old table says. Its name is made anew, not read there."""
    source = old / format_file_name(row["seed"], row["index"], job.settings.format)
    try:
        data = read_image_file(source)
    except OSError:
        return False
    if not has_sha256(data, row["sha256"]):
        return False
    with writer.guard(), contextlib.suppress(OccupiedPathError):  # then its worker says so
        link_or_copy(
            source, job.folder / request.file_name, job.scratch, lambda found: has_sha256(found, row["sha256"])
        )
        return True
    return False


def read_image_file(path: Path) -> bytes:
    """Raises OSError for what is missing, too large, or lies behind a link."""
    if path.is_symlink() or path.parent.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return read_file(path)


def has_sha256(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256
