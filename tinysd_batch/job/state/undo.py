"""Take back what a run has written to a job's folder before its first image."""

import contextlib
from pathlib import Path

from tinysd_batch.job.manifest.snapshot import ROWS_FILE
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.inherited_seeds import SEEDS_FILE
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.precision_record import PRECISION_FILE


def find_missing_folders(folder: Path) -> list[Path]:
    """The folder and those around it that are not there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def undo_job_start(job: Job, new_folders: list[Path]) -> None:
    """Remove what a run wrote that ended before its first image, so that it may start with other settings."""
    remove_job_state(job)
    (job.state_folder / "lock").unlink(missing_ok=True)
    paths = ResultsTable(job.folder)
    for folder in (paths.parts_folder, paths.journal, job.scratch, job.state_folder, *new_folders):
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def remove_job_state(job: Job) -> None:
    """Remove what the job's folder says of settings, rows and results."""
    paths = ResultsTable(job.folder)
    state = [job.state_folder / name for name in (ROWS_FILE, SEEDS_FILE, PRECISION_FILE)]
    for file in (*paths.sealed_files(), *paths.journal_parts(), job.folder / JOB_FILE, *state):
        file.unlink(missing_ok=True)
