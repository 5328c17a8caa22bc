"""What a job folder says of itself, while the job runs and after."""

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
from tinysd_batch.job.results.compare import FileDifferences, find_differences
from tinysd_batch.job.results.rows import parse_invalid_reason
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.job import STATE_FOLDER
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.records import Status
from tinysd_batch.report.formatting import count, format_row_label, print_line, to_one_line
from tinysd_batch.storage.atomic import read_file
from tinysd_batch.storage.lock import is_locked

ReadResult = TypeVar("ReadResult")
MAX_SHOWN_FAULTS = 10
STATUS_READ_ATTEMPTS = 5
STATUS_COLUMNS = ("row", "index", "status", "error_message", "device_name", "worker", "text_s", "denoise_s", "decode_s")
FIRST_SHOWN_SETTINGS = (
    "prompt", "negative_prompt", "seed", "width", "height", "steps", "sampler", "scale", "eta", "model",
)  # fmt: skip


@dataclass(slots=True)
class JobStatus:
    """Counts over a job's results."""

    images: int
    invalid_rows: int
    seed: int
    model: str
    running: bool
    differences: FileDifferences  # between the table and the files on disk
    by_status: Counter[str] = field(default_factory=Counter)
    by_worker: Counter[str] = field(default_factory=Counter)
    seconds_by_worker: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    faults: list[str] = field(default_factory=list)  # the first few, one line each

    @property
    def left(self) -> int:
        return self.images - sum(number for status, number in self.by_status.items() if status != Status.INVALID)


def read_status(job_folder: Path) -> JobStatus:
    """Raises UsageError when the folder is no job."""
    saved = read_job_json(job_folder)
    status = JobStatus(
        images=saved["images"], invalid_rows=saved["invalid_rows"], seed=saved["seed"],
        model=saved["model"]["name"], running=is_locked(job_folder / STATE_FOLDER / "lock"),
        differences=read_while_running(lambda: find_differences(job_folder)),
    )  # fmt: skip
    for row, index, state, message, device, worker, *seconds in read_status_columns(job_folder):
        status.by_status[state] += 1
        if state != Status.OK:
            line, message = parse_invalid_reason(message or "") if state == Status.INVALID else (None, message)
            where = format_row_label(row, line) + (f", image {index}" if index else "")
            status.faults.append(f"{where}: {state}: {message}")
        elif seconds[1] is not None:
            name = f"{worker or 'earlier run'} on {device}"
            status.by_worker[name] += 1
            status.seconds_by_worker[name] += sum(part or 0.0 for part in seconds)
    return status


def read_status_columns(job_folder: Path) -> Iterator[tuple[Any, ...]]:
    """The columns `TOLD` of each row that counts."""
    table = read_while_running(lambda: ResultsTable(job_folder).read_newest([*STATUS_COLUMNS]))
    return zip(*(table[name].to_pylist() for name in STATUS_COLUMNS), strict=True)


def read_while_running(read: Callable[[], ReadResult]) -> ReadResult:
    """Read the table, and again when the driver sealed the journal away meanwhile."""
    for _ in range(STATUS_READ_ATTEMPTS - 1):
        with contextlib.suppress(StorageError):
            return read()
    return read()


def print_status(job_folder: Path, status: JobStatus, console: Console) -> None:
    state = "running" if status.running else "finished" if status.left <= 0 else "stopped"
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
    for worker, images in sorted(status.by_worker.items()):
        each = status.seconds_by_worker[worker] / images
        print_line(
            console, f"{worker}: {count(images, 'image')}, {each:.2f} s each, {3600 / max(each, 1e-9):,.0f} an hour"
        )
    for fault in status.faults[:MAX_SHOWN_FAULTS]:
        print_line(console, to_one_line(fault, 300))
    if len(status.faults) > MAX_SHOWN_FAULTS:
        console.print(f"and {len(status.faults) - MAX_SHOWN_FAULTS:,} more; the results table names them all")


def print_image(path: Path, console: Console) -> None:
    """What the picture says of itself. Raises UsageError when it says nothing."""
    try:
        data = read_file(path)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    parameters, found = read_metadata(data)
    if not found and not parameters:
        raise UsageError(f"{path}: no settings are written in it, or it is no whole PNG, JPEG or WebP picture")
    made = found.pop("made", {})
    told = {name: found.pop(name) for name in FIRST_SHOWN_SETTINGS if name in found} | found
    for name, value in {**told, **(made if isinstance(made, dict) else {})}.items():
        if value not in (None, "", []):
            print_line(console, f"{to_one_line(name, 40):<20} {to_one_line(str(value), 1000)}")
    if not told:
        for line in parameters.splitlines():
            print_line(console, to_one_line(line, 1000))
