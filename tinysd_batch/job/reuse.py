"""Take finished pictures over from another job, where they would come out the same.

That is so where the `image_id` is the same and the file is what the other job's table says.
"""

import errno
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tinysd_batch.config import Settings
from tinysd_batch.errors import UsageError
from tinysd_batch.job.folder import DECIDING, Job, check_reusable, read_job_json
from tinysd_batch.job.plan import file_name
from tinysd_batch.job.results import ResultsWriter, image_row
from tinysd_batch.job.tables import ResultsPaths
from tinysd_batch.records import ImageRequest, ImageResult, Status
from tinysd_batch.storage import read_file, share, storage_errors, sync_folder

SYNC_EVERY = 500  # pictures
FILE_SETTINGS = ("format", "quality", "no_metadata", "skip_save")
# What the new row says as the old one did: how the picture was made.
CARRIED = (
    "sha256", "bytes", "attempts", "degraded", "n_tokens", "truncated", "negative_truncated", "precision",
    "device_name", "worker", "node", "text_s", "denoise_s", "decode_s", "peak_memory_bytes", "started_at",
    "finished_at", "version",
)  # fmt: skip


class Notes(Protocol):
    """Who is told."""

    def note(self, line: str) -> None: ...


def reuse_pictures(
    job: Job, old: Path, wanted: Iterable[ImageRequest], writer: ResultsWriter, notes: Notes,
    should_stop: Callable[[], bool],
) -> set[int]:  # fmt: skip
    """Put the pictures of `old` that are among `wanted` into the job, with their rows; return their indexes.

    Where `old` is gone or was drawn otherwise, that is told, and everything is drawn. Raises JobLockedError while `old`
    runs, StorageError where its table or our disk fails.
    """
    try:
        check_reusable(old, job.folder)
        saved = read_job_json(old)
    except UsageError as error:
        notes.note(f"No more pictures are reused: {error}")
        return set()
    taken: set[int] = set()
    broken = 0
    reason = reason_against(job, saved)
    pairs = iter(()) if reason else find_pairs(old, wanted)
    while (group := list(islice(pairs, SYNC_EVERY))) and not should_stop():
        indexes = take_group(job, old, group, writer)
        broken += len(group) - len(indexes)
        taken |= indexes
        writer.flush_if_due()
    tell(job, old, reason or told_differences(job, saved), len(taken), broken, notes)
    return taken


def tell(job: Job, old: Path, why_none: str, taken: int, broken: int, notes: Notes) -> None:
    if taken:
        notes.note(f"Reused from {old}: {taken:,} image{'s' * (taken != 1)}")
    elif job.is_new:
        notes.note(f"Nothing can be reused from {old}: {why_none or 'no image is the same'}")
    if broken:
        notes.note(f"Drawn again: {broken:,} whose file in {old} is missing or not what its table says")


def reason_against(job: Job, saved: dict[str, Any]) -> str:
    """Why no picture of the job that `saved` describes can be one of ours, where that is plain."""
    if saved["model"]["digest"] != job.model.digest:
        return f"it was drawn by the model {saved['model']['name']}, and {job.model.name} has other weights"
    return told_differences(job, saved, FILE_SETTINGS)


def told_differences(job: Job, saved: dict[str, Any], names: Iterable[str] = DECIDING) -> str:
    """`steps: 20 there, 30 here`"""
    return "; ".join(
        f"{name}: {was} there, {getattr(job.settings, name)} here"
        for name in names
        if (was := saved["settings"].get(name, Settings.model_fields[name].default)) != getattr(job.settings, name)
    )


def find_pairs(old: Path, wanted: Iterable[ImageRequest]) -> Iterator[tuple[dict[str, Any], ImageRequest]]:
    """Rows of the old table, each with an image that is the same."""
    by_id: dict[str, list[ImageRequest]] = defaultdict(list)
    for request in wanted:
        by_id[request.image_id].append(request)
    for row in ResultsPaths(old).read_rows(None):
        if is_reusable(row):
            for request in by_id.pop(row["image_id"], ()):
                yield row, request


def is_reusable(row: dict[str, Any]) -> bool:
    return row["status"] == Status.OK and None not in (row["sha256"], row["index"], row["seed"], row["file_name"])


def count_reusable(job: Job, image_ids: AbstractSet[str]) -> int:
    """How many of these images the job's `reuse` has, by its table; the files are not looked at."""
    if job.reuse is None or reason_against(job, read_job_json(job.reuse)):
        return 0
    rows = ResultsPaths(job.reuse).read_rows(["row", "status", "image_id", "sha256", "index", "seed", "file_name"])
    there = {row["image_id"] for row in rows if is_reusable(row)}
    return len(there & image_ids)


def take_group(
    job: Job, old: Path, group: list[tuple[dict[str, Any], ImageRequest]], writer: ResultsWriter
) -> set[int]:
    """Take some pictures over; their rows may be written once the folders are synced."""
    good = [(row, request) for row, request in group if take_file(job, old, row, request, writer)]
    for folder in {(job.folder / request.file_name).parent for _, request in good}:
        with storage_errors(folder):
            sync_folder(folder)
    for row, request in good:
        new = image_row(request, ImageResult(request.index, Status.OK), job.run_columns())
        made = {name: row[name] for name in CARRIED}
        writer.append(new | made | {"file_name": request.file_name, "reused": str(old)})
    return {request.index for _, request in good}


def take_file(job: Job, old: Path, row: dict[str, Any], request: ImageRequest, writer: ResultsWriter) -> bool:
    """Share the picture's file, if it is what the old table says. Its name is made anew, not read there."""
    source = old / file_name(row["seed"], row["index"], job.settings.format)
    try:
        data = read_picture(source)
    except OSError:
        return False
    if not has_hash(data, row["sha256"]):
        return False
    with writer.guard():
        share(source, job.folder / request.file_name, job.scratch, lambda found: has_hash(found, row["sha256"]))
    return True


def read_picture(path: Path) -> bytes:
    """Raises OSError for what is missing, too large, or lies behind a link."""
    if path.is_symlink() or path.parent.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return read_file(path)


def has_hash(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256
