"""What a job folder says of itself, while the job runs and after."""

import contextlib
import fcntl
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinysd_batch.errors import StorageError, UsageError
from tinysd_batch.images import read_entries
from tinysd_batch.job.folder import STATE_FOLDER, read_job_json
from tinysd_batch.job.results import ResultsPaths
from tinysd_batch.records import Status
from tinysd_batch.report.text import count, one_line, say
from tinysd_batch.storage import check_regular, read_file

MAX_FAULTS = 10
READ_ATTEMPTS = 5
FIRST_TOLD = (
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
    )  # fmt: skip
    columns = [
        "index",
        "row",
        "status",
        "error_class",
        "error_message",
        "device_name",
        "worker",
        "text_s",
        "denoise_s",
        "decode_s",
    ]
    newest = {(row["row"], row["index"]): row for row in read_rows_of_running_job(job_folder, columns)}
    for row in newest.values():
        status.by_status[row["status"]] += 1
        if row["status"] != Status.OK:
            where = f"row {row['row']}" + (f", image {row['index']}" if row["index"] else "")
            status.faults.append(f"{where}: {row['status']}: {row['error_message']}")
        elif row["denoise_s"] is not None:
            worker = f"{row['worker'] or 'earlier run'} on {row['device_name']}"
            status.by_worker[worker] += 1
            status.seconds_by_worker[worker] += sum(row[name] or 0.0 for name in ("text_s", "denoise_s", "decode_s"))
    return status


def read_rows_of_running_job(job_folder: Path, columns: list[str]) -> list[dict[str, Any]]:
    """All rows, read anew when the driver sealed the journal away meanwhile."""
    for _ in range(READ_ATTEMPTS - 1):
        with contextlib.suppress(StorageError):
            return list(ResultsPaths(job_folder).read_rows(columns))
    return list(ResultsPaths(job_folder).read_rows(columns))


def is_locked(path: Path) -> bool:
    """Whether a driver holds the job's lock now."""
    if not path.exists():
        return False
    check_regular(path)
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def print_status(job_folder: Path, status: JobStatus, console: Console) -> None:
    state = "running" if status.running else "finished" if status.left <= 0 else "stopped"
    say(console, f"{job_folder}: {state}, model {status.model}, seed {status.seed}")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in Status:
        if status.by_status[name]:
            table.add_row(str(name), f"{status.by_status[name]:,}")
    if status.left > 0:
        table.add_row("left", f"{status.left:,}")
    console.print(table)
    for worker, images in sorted(status.by_worker.items()):
        each = status.seconds_by_worker[worker] / images
        say(console, f"{worker}: {count(images, 'image')}, {each:.2f} s each, {3600 / max(each, 1e-9):,.0f} an hour")
    for fault in status.faults[:MAX_FAULTS]:
        say(console, one_line(fault, 300))
    if len(status.faults) > MAX_FAULTS:
        console.print(f"and {len(status.faults) - MAX_FAULTS:,} more; the results table names them all")


def print_image(path: Path, console: Console) -> None:
    """What the picture says of itself. Raises UsageError when it says nothing."""
    try:
        data = read_file(path)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    parameters, found = read_entries(data)
    if not found and not parameters:
        raise UsageError(f"{path}: no settings are written in it, or it is no whole PNG, JPEG or WebP picture")
    made = found.pop("made", {})
    told = {name: found.pop(name) for name in FIRST_TOLD if name in found} | found
    for name, value in {**told, **(made if isinstance(made, dict) else {})}.items():
        if value not in (None, "", []):
            say(console, f"{one_line(name, 40):<20} {one_line(str(value), 1000)}")
    if not told:
        for line in parameters.splitlines():
            say(console, one_line(line, 1000))
