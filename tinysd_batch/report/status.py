"""Show the state of a job, while it runs and afterwards, and the settings stored in an image."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.images import read_metadata
from tinysd_batch.job.job_log import LOG_FILE_NAME
from tinysd_batch.job.results.columns import COLUMNS, ColumnSource
from tinysd_batch.job.results.compare import FileDifferences, find_differences
from tinysd_batch.job.results.rows import parse_invalid_reason
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job import STATE_FOLDER
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.records import Status
from tinysd_batch.report.formatting import format_count, format_row_label, print_line, to_one_line
from tinysd_batch.storage.atomic import read_file
from tinysd_batch.storage.lock import is_locked

ReadResult = TypeVar("ReadResult")
MAX_SHOWN_FAULTS = 10
STATUS_READ_ATTEMPTS = 5
STATUS_COLUMNS = ("row", "index", "status", "error_message", "device_name", "worker", "text_s", "denoise_s", "decode_s")
FIRST_SHOWN_SETTINGS = (
    *(column.name for column in COLUMNS if column.source is ColumnSource.SETTINGS or column.name in ("prompt", "seed")),
    "model",
)


@dataclass(slots=True)
class JobStatus:
    """The state of a job: counts over its results."""

    images: int
    invalid_rows: int
    seed: int
    model: str
    is_running: bool
    differences: FileDifferences  # between the results table and the files on disk
    by_status: Counter[str] = field(default_factory=Counter)
    by_worker: Counter[str] = field(default_factory=Counter)
    seconds_by_worker: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    faults: list[str] = field(default_factory=list)  # one line each

    @property
    def left(self) -> int:
        return self.images - sum(number for status, number in self.by_status.items() if status != Status.INVALID)


def read_status(job_folder: Path) -> JobStatus:
    """Read the state of a job. Raises UsageError if the folder is not a job."""
    saved = read_job_json(job_folder)
    status = JobStatus(
        images=saved["images"],
        invalid_rows=saved["invalid_rows"],
        seed=saved["seed"],
        model=saved["model"]["name"],
        is_running=is_locked(job_folder / STATE_FOLDER / "lock"),
        differences=read_while_running(lambda: find_differences(job_folder)),
    )
    for row, index, image_status, message, device, worker, *seconds in read_status_columns(job_folder):
        status.by_status[image_status] += 1
        if image_status != Status.OK:
            line, message = parse_invalid_reason(message or "") if image_status == Status.INVALID else (None, message)
            label = format_row_label(row, line) + (f", image {index}" if index else "")
            status.faults.append(f"{label}: {image_status}: {message}")
        elif seconds[1] is not None:
            name = f"{worker or 'earlier run'} on {device}"
            status.by_worker[name] += 1
            status.seconds_by_worker[name] += sum(stage_s or 0.0 for stage_s in seconds)
    return status


def read_status_columns(job_folder: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the STATUS_COLUMNS of the newest row of each image."""
    table = read_while_running(lambda: ResultsTable(job_folder).read_newest([*STATUS_COLUMNS]))
    return zip(*(table[name].to_pylist() for name in STATUS_COLUMNS), strict=True)


def read_while_running(read: Callable[[], ReadResult]) -> ReadResult:
    """Read the results, and retry if the running driver merged the journal into the table at the same time."""
    for _ in range(STATUS_READ_ATTEMPTS - 1):
        with contextlib.suppress(StorageError):
            return read()
    return read()


def print_status(job_folder: Path, status: JobStatus, console: Console) -> None:
    state = "running" if status.is_running else "finished" if status.left <= 0 else "stopped"
    print_line(console, f"{job_folder}: {state}, model {status.model}, seed {status.seed}")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in Status:
        if status.by_status[name]:
            table.add_row(str(name), f"{status.by_status[name]:,}")
    if status.left > 0:
        table.add_row("left", f"{status.left:,}")
    console.print(table)
    if status.differences.indexes:
        print_line(console, f"Files: {status.differences}; {status.differences.advice}")
    print_log_path(job_folder, console)
    for worker, images in sorted(status.by_worker.items()):
        image_s = status.seconds_by_worker[worker] / images
        images_per_hour = 3600 / max(image_s, 1e-9)
        print_line(
            console,
            f"{worker}: {format_count(images, 'image')}, {image_s:.2f} s each, {images_per_hour:,.0f} per hour",
        )
    for fault in status.faults[:MAX_SHOWN_FAULTS]:
        print_line(console, to_one_line(fault, 300))
    if len(status.faults) > MAX_SHOWN_FAULTS:
        console.print(f"and {len(status.faults) - MAX_SHOWN_FAULTS:,} more; the results table lists all of them")


def print_log_path(job_folder: Path, console: Console) -> None:
    log = job_folder / STATE_FOLDER / LOG_FILE_NAME
    if log.is_file():
        print_line(console, f"Log: {log}")


def print_image_settings(path: Path, console: Console) -> None:
    """Print the settings stored in an image. Raises UsageError if there are none."""
    try:
        data = read_file(path)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    parameters, metadata = read_metadata(data)
    if not metadata and not parameters:
        raise UsageError(f"{path}: has no stored settings, or is not a complete PNG, JPEG or WebP image")
    result = metadata.pop("made", {})
    settings = {name: metadata.pop(name) for name in FIRST_SHOWN_SETTINGS if name in metadata} | metadata
    for name, value in {**settings, **(result if isinstance(result, dict) else {})}.items():
        if value not in (None, "", []):
            print_line(console, f"{to_one_line(name, 40):<20} {to_one_line(str(value), 1000)}")
    if not settings:
        for line in parameters.splitlines():
            print_line(console, to_one_line(line, 1000))
