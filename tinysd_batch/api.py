"""Jobs from Python: what `tinysd-batch submit` does, and the results as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysd_batch.config import Settings
from tinysd_batch.errors import UsageError
from tinysd_batch.records import Status
from tinysd_batch.values import parse_integer

if TYPE_CHECKING:
    import pyarrow as pa

SETTING_ALIASES = {
    "num_inference_steps": "steps",
    "ddim_steps": "steps",
    "guidance_scale": "scale",
    "cfg_scale": "scale",
    "cfg": "scale",
    "num_images_per_prompt": "n_samples",
    "num_images": "n_samples",
    "batch_size": "n_samples",
    "sampler_name": "sampler",
    "negative": "negative_prompt",
    "H": "height",
    "W": "width",
    "ddim_eta": "eta",
}
INTEGER_ARGUMENTS = {
    "seed", "steps", "height", "width", "n_iter", "n_samples", "quality", "n_rows", "unet_bs", "max_batch", "workers",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended."""

    folder: Path
    images: int  # in the job
    generated: int  # in this run
    reused: int  # taken over from another job in this run
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
    """Generate an image for every row of a manifest, or go on with a job, as `tinysd-batch submit` does.

    Args:
        manifest: a table with a prompt column, a text file with a prompt per line, a job.toml that names one, or the
            folder of a job to go on with.
        output: the job folder; outputs/<manifest name> if None.
        reuse: an earlier job's folder, whose images are taken over where they would come out the same.
        limit: only the first so many images; the same call without it goes on.
        retry_failed: try images again that failed.
        redo_missing: generate images again whose files are gone, even if that is more than half of them.
        take_over: take the job from a process that has it and does not answer.
        progress: show what the command shows.
        settings: what the command's options and job.toml set, such as model="folder", steps=20, inline=True (in this
            process, without Ray) or workers=2.

    Raises:
        TypeError: a setting that is not known.
        TinySDError: what the command prints in one line before it exits; the job goes on with the same call.
    """
    from contextlib import ExitStack

    from rich.console import Console

    from tinysd_batch.job.driver import run_job
    from tinysd_batch.job.open_pool import make_pool_factory
    from tinysd_batch.job.state.prepare_job import prepare_job
    from tinysd_batch.report.progress_bar import RunProgressBar

    job, _ = prepare_job(
        Path(manifest), Path(output) if output is not None else None, (), resolve_aliases(settings),
        Path(reuse) if reuse is not None else None,
    )  # fmt: skip
    with ExitStack() as stack:
        shown = RunProgressBar(Console(stderr=True, highlight=False, quiet=not progress), verbose=False)
        summary = run_job(
            job, make_pool_factory(job), stack.enter_context(shown), lambda: False, limit, retry_failed=retry_failed,
            redo_missing=redo_missing, take_over=take_over,
        )  # fmt: skip
    return JobResult(
        job.folder, summary.total, summary.counts[Status.OK], summary.reused, summary.failed, summary.invalid_rows,
        summary.left, summary.seconds,
    )  # fmt: skip


def resolve_aliases(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under their own names. Raises TypeError for an unknown one, UsageError for one that is given twice."""
    named: dict[str, Any] = {}
    for given, written in settings.items():
        name = SETTING_ALIASES.get(given, given)
        if name not in Settings.model_fields:
            raise TypeError(f"submit() got an unexpected keyword argument {given!r}{suggest_setting(given)}")
        value = to_plain_value(name, written)
        if name in named and named[name] != value:
            raise UsageError(
                f"{name} = {named[name]} and {given} = {value}: two names of one setting; give one of them"
            )
        named[name] = value
    return named


def to_plain_value(name: str, value: Any) -> Any:
    """A setting's value as job.toml would have it: paths as text, whole numbers of any type as int, no seed as None."""
    if isinstance(value, Path):
        return str(value)
    if callable(item := getattr(value, "item", None)):  # of numpy or torch
        value = item()
    if name == "vram_budget" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if name not in INTEGER_ARGUMENTS or isinstance(value, str | bool) or value is None:
        return value
    if name == "seed" and value == -1:
        return None
    try:
        return parse_integer(value)
    except ValueError:
        return value  # which `config.resolve` refuses by name


def suggest_setting(name: str) -> str:
    import difflib

    alike = difflib.get_close_matches(name, [*Settings.model_fields, *SETTING_ALIASES], n=1)
    return f"; did you mean {alike[0]}?" if alike else ""


def read_results(folder: str | Path, columns: Sequence[str] | None = None) -> "pa.Table":
    """A job's results: one row per image and per row that cannot be generated, in the manifest's order.

    Also while the job runs. `columns` names those to read, all if None, with the manifest's own columns among them.

    Raises:
        UsageError: the folder is not a job, or has no such column.
        StorageError: a file of the table is damaged.
    """
    from tinysd_batch.job.results.table import ResultsTable
    from tinysd_batch.job.state.job_json import read_job_json

    read_job_json(Path(folder))
    columns = [columns] if isinstance(columns, str) else columns
    table = ResultsTable(Path(folder)).read_newest_all_columns()
    if columns is None:
        return table
    if unknown := [name for name in columns if name not in table.column_names]:
        raise UsageError(f"{folder}: has no column {', '.join(unknown)}; there are {', '.join(table.column_names)}")
    return table.select(list(columns))
