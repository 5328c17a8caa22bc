"""Remove what a run has written to the job folder if it fails before its first image."""

import contextlib
from pathlib import Path

from tinysd_batch.job.job_log import LOG_FILE_NAME
from tinysd_batch.job.manifest.snapshot import ROWS_FILE
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.inherited_seeds import SEEDS_FILE
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.precision_record import PRECISION_FILE


def find_missing_folders(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def undo_job_start(job: Job, new_folders: list[Path]) -> None:
    """Remove everything that a run wrote before its first image, so that the job can start with other settings.

    Args:
        job: The job, whose lock the caller holds.
        new_folders: Folders that this run created, the innermost first.
    """
    remove_job_state(job)
    for name in ("lock", LOG_FILE_NAME, f"{LOG_FILE_NAME}.1"):
        (job.state_folder / name).unlink(missing_ok=True)
    results = ResultsTable(job.folder)
    for folder in (results.parts_folder, results.journal, job.scratch, job.state_folder, *new_folders):
        with contextlib.suppress(OSError):  # not empty, or never created
            folder.rmdir()


def remove_job_state(job: Job) -> None:
    """Remove the files that hold the settings, rows and results of a job."""
    results = ResultsTable(job.folder)
    state_files = [job.state_folder / name for name in (ROWS_FILE, SEEDS_FILE, PRECISION_FILE)]
    for file in (*results.sealed_files(), *results.journal_parts(), job.folder / JOB_FILE, *state_files):
        file.unlink(missing_ok=True)
