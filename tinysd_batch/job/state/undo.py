"""Take back what a run has written to a job's folder before its first image."""

import contextlib
from pathlib import Path

from tinysd_batch.job.manifest.snapshot import ROWS_FILE
from tinysd_batch.job.results.table import ResultsPaths
from tinysd_batch.job.state.inherited_seeds import SEEDS_FILE
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.precision_record import RECORD_FILE


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those around it that are not there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def take_back(job: Job, new_folders: list[Path]) -> None:
    """Remove what a run wrote that ended before its first image, so that it may start with other settings."""
    remove_state(job)
    (job.state / "lock").unlink(missing_ok=True)
    paths = ResultsPaths(job.folder)
    for folder in (paths.parts_folder, paths.journal, job.scratch, job.state, *new_folders):
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def remove_state(job: Job) -> None:
    """Remove what the job's folder says of settings, rows and results."""
    paths = ResultsPaths(job.folder)
    state = [job.state / name for name in (ROWS_FILE, SEEDS_FILE, RECORD_FILE)]
    for file in (*paths.sealed_files(), *paths.journal_parts(), job.folder / JOB_FILE, *state):
        file.unlink(missing_ok=True)
