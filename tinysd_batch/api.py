"""Run jobs from Python, as `tinysd-batch submit` does, and read their results as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysd_batch.errors import UsageError
from tinysd_batch.records import Status
from tinysd_batch.settings.schema import SETTINGS
from tinysd_batch.settings.sources import suggest_name

if TYPE_CHECKING:
    import pyarrow as pa

SETTING_ALIASES = {alias: name for name, setting in SETTINGS.items() for alias in setting.aliases}


@dataclass(frozen=True, slots=True)
class JobResult:
    """The outcome of a job."""

    folder: Path
    images: int  # in the job
    generated: int  # in this run
    reused: int  # from another job, in this run
    failed: int
    invalid_rows: int
    left: int  # not generated yet
    seconds: float

    def read_results(self, columns: Sequence[str] | None = None) -> "pa.Table":
        return read_results(self.folder, columns)


def submit(
    manifest: str | Path,
    output: str | Path | None = None,
    *,
    reuse: str | Path | None = None,
    limit: int | None = None,
    retry_failed: bool = False,
    redo_missing: bool = False,
    take_over: bool = False,
    progress: bool = False,
    **settings: Any,
) -> JobResult:
    """Generate an image for every row of a manifest, or resume a job, as `tinysd-batch submit` does.

    Args:
        manifest: A table with a prompt column, a text file with one prompt per line, a job.toml that names one, or the
            folder of a job to resume.
        output: The job folder; outputs/<manifest name> if None.
        reuse: The folder of an earlier job, whose images are reused where they would be identical.
        limit: Generate only the first images, up to this number. The same call without it resumes the job.
        retry_failed: Retry images that failed.
        redo_missing: Regenerate images whose files are missing, even if that is more than half of them.
        take_over: Take over the job from a process that does not respond.
        progress: Show the progress that the command shows.
        settings: The settings of the command line and of job.toml, such as model="folder", steps=20, inline=True (in
            this process, without Ray) or workers=2.

    Raises:
        TypeError: A setting is unknown.
        TinySDError: Any error that ends the command. The same call resumes the job.
    """
    from contextlib import ExitStack

    from rich.console import Console

    from tinysd_batch.job.driver import run_job
    from tinysd_batch.job.open_pool import make_pool_factory
    from tinysd_batch.job.state.prepare_job import prepare_job
    from tinysd_batch.report.progress_bar import RunProgressBar

    job, _ = prepare_job(
        Path(manifest),
        Path(output) if output is not None else None,
        (),
        resolve_aliases(settings),
        Path(reuse) if reuse is not None else None,
    )
    with ExitStack() as stack:
        bar = RunProgressBar(Console(stderr=True, highlight=False, quiet=not progress), verbose=False)
        summary = run_job(
            job,
            make_pool_factory(job),
            stack.enter_context(bar),
            lambda: False,
            limit,
            retry_failed=retry_failed,
            redo_missing=redo_missing,
            take_over=take_over,
        )
    return JobResult(
        folder=job.folder,
        images=summary.total,
        generated=summary.counts[Status.OK],
        reused=summary.reused,
        failed=summary.failed,
        invalid_rows=summary.invalid_rows,
        left=summary.left,
        seconds=summary.seconds,
    )


def resolve_aliases(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the names that other libraries use by our own.

    Raises:
        TypeError: A setting is unknown.
        UsageError: A setting is given twice, under different names and with different values.
    """
    resolved: dict[str, Any] = {}
    for alias, value in settings.items():
        name = SETTING_ALIASES.get(alias, alias)
        if name not in SETTINGS:
            suggestion = suggest_name(alias, [*SETTINGS, *SETTING_ALIASES])
            raise TypeError(f"submit() got an unexpected keyword argument {alias!r}{suggestion}")
        if name in resolved and resolved[name] != value:
            raise UsageError(
                f"{name} = {resolved[name]} and {alias} = {value}: two names of one setting; give one of them"
            )
        resolved[name] = value
    return resolved


def read_results(folder: str | Path, columns: Sequence[str] | None = None) -> "pa.Table":
    """Read a job's results: one row per image and per invalid row, in the manifest's order.

    It also works while the job runs.

    Args:
        folder: The job folder.
        columns: The columns to read, including the manifest's own; all if None.

    Raises:
        UsageError: The folder is not a job, or has no such column.
        StorageError: A file of the table is damaged.
    """
    from tinysd_batch.job.results.table import ResultsTable
    from tinysd_batch.job.state.job_json import read_job_json

    read_job_json(Path(folder))
    columns = [columns] if isinstance(columns, str) else columns
    table = ResultsTable(Path(folder)).read_newest_all_columns()
    if columns is None:
        return table
    if unknown := [name for name in columns if name not in table.column_names]:
        raise UsageError(f"{folder}: no column {', '.join(unknown)}; the columns are {', '.join(table.column_names)}")
    return table.select(list(columns))
