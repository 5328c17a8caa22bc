"""Run a job: hand chunks of micro-batches to workers, and write down what becomes of every image."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import takewhile

from tinysd_batch.errors import ManifestError, UsageError
from tinysd_batch.job.dispatch import CHANGED, Dispatch, Progress, Summary
from tinysd_batch.job.folder import (
    JOB_FILE,
    Job,
    check_still_same_job,
    missing_folders,
    save_job,
    stamp,
    take_back,
)
from tinysd_batch.job.formats import is_jsonl, read_extra_fields
from tinysd_batch.job.manifest import read_rows
from tinysd_batch.job.plan import cut_batches, plan_images
from tinysd_batch.job.pool import Pool
from tinysd_batch.job.results import ResultsPaths, ResultsWriter, invalid_row, results_schema
from tinysd_batch.records import InvalidRow, MicroBatch, Row, Status
from tinysd_batch.storage import Held, lock, sweep_temporaries

__all__ = ["PoolFactory", "Progress", "Summary", "run_job"]

STAT_EVERY_ROWS = 64
MAX_KEYS = 500  # different ones of a JSONL file, of which each becomes a column


@dataclass(slots=True)
class Survey:
    """What a first pass over the manifest found."""

    images: int
    invalid: list[InvalidRow]
    extra: list[str]  # names of the columns we do not know, in the order they came


def survey(job: Job) -> Survey:
    """Read the whole manifest once, so that its faults show before anything heavy starts."""
    found = Survey(0, [], [])
    names: dict[str, None] = {}
    for row in read_rows(job.manifest, job.defaults(), job.settings.strict):
        if isinstance(row, InvalidRow):
            found.invalid.append(row)
        else:
            found.images += row.n_iter * row.n_samples
        names.update(dict.fromkeys(row.extra))
        if len(names) > MAX_KEYS and is_jsonl(job.manifest):
            raise ManifestError(f"{job.manifest}: over {MAX_KEYS} different keys besides the known ones")
    found.extra.extend(names)
    return found


PoolFactory = Callable[[int], AbstractContextManager[Pool]]


def run_job(
    job: Job, open_pool: PoolFactory, progress: Progress, should_stop: Callable[[], bool], limit: int | None = None,
    take_over: bool = False,
) -> Summary:  # fmt: skip
    """Make every image of the job (or the first `limit`) that is not finished. `open_pool` gets the number to make.

    With `take_over` the job is taken from a driver that has it and does not give it up.
    """
    started = time.monotonic()
    surveyed = survey(job)
    new_folders = missing_folders(job.folder)
    with lock(job.state / "lock", take_over) as held:
        check_still_same_job(job)
        is_new = not (job.folder / JOB_FILE).exists()
        try:
            summary = run_locked(job, surveyed, open_pool, progress, should_stop, limit, held)
        except UsageError:
            if is_new and not read_finished(job).images:
                take_back(job, new_folders)
            raise
    summary.seconds = time.monotonic() - started
    return summary


def run_locked(
    job: Job, surveyed: Survey, open_pool: PoolFactory, progress: Progress, should_stop: Callable[[], bool],
    limit: int | None, held: Held,
) -> Summary:  # fmt: skip
    total = min(surveyed.images, limit) if limit else surveyed.images
    sweep(job)
    job.stop_file.unlink(missing_ok=True)
    schema = results_schema(read_extra_fields(job.manifest, surveyed.extra))
    writer = ResultsWriter(job.folder, schema, surveyed.images + len(surveyed.invalid), held.guard)
    done = read_finished(job)
    finished = {index for index in done.images if 1 <= index <= total}
    summary = Summary(total, len(finished), len(surveyed.invalid), failed_before=len(done.failed & finished))
    save_job(job, surveyed.images, len(surveyed.invalid))
    write_invalid_rows(job, surveyed.invalid, done.invalid_rows, writer)
    progress.started(total, len(finished), surveyed.invalid)
    try:
        if summary.left:
            batches = takewhile(lambda batch: batch.images[0].index <= total, todo(job, finished))
            with open_pool(summary.left) as pool:
                Dispatch(job, pool, writer, progress, summary, within(batches, total)).run(should_stop)
    finally:
        with held.guard():
            sweep(job)  # a killed worker cannot clean up
            job.stop_file.unlink(missing_ok=True)
            writer.seal()
        progress.durable()
    summary.stopped = bool(summary.left)
    return summary


def sweep(job: Job) -> None:
    paths = ResultsPaths(job.folder)
    sweep_temporaries(job.folder, job.scratch, paths.journal, paths.parts_folder)


def read_unchanged_rows(job: Job) -> Iterator[Row | InvalidRow]:
    """The manifest's rows again, hours later perhaps; raise ManifestError when the file is not what it was."""
    for number, row in enumerate(read_rows(job.manifest, job.defaults(), job.settings.strict)):
        if number % STAT_EVERY_ROWS == 0 and stamp(job.manifest) != job.manifest_stamp:
            raise ManifestError(f"{job.manifest}: {CHANGED}")
        yield row


def todo(job: Job, finished: set[int]) -> Iterator[MicroBatch]:
    return cut_batches(plan_images(read_unchanged_rows(job), job.common()), finished, job.settings.max_batch)


def within(batches: Iterable[MicroBatch], last_index: int) -> Iterator[MicroBatch]:
    """The batches without images past `last_index`, which still ride along."""
    for batch in batches:
        wanted = frozenset(index for index in batch.wanted if index <= last_index)
        if wanted:
            yield MicroBatch(batch.images, wanted)


@dataclass(slots=True)
class Finished:
    """What the results say of earlier runs."""

    images: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    invalid_rows: set[int] = field(default_factory=set)


def read_finished(job: Job) -> Finished:
    finished = Finished()
    for row in ResultsPaths(job.folder).read_rows(["index", "row", "status"]):
        if row["index"] is None:
            finished.invalid_rows.add(row["row"])
        else:
            finished.images.add(row["index"])
            if row["status"] != Status.OK:
                finished.failed.add(row["index"])
    return finished


def write_invalid_rows(job: Job, invalid: list[InvalidRow], written: set[int], writer: ResultsWriter) -> None:
    for row in invalid:
        if row.number not in written:
            writer.append(invalid_row(row, job.run_columns()))
            writer.flush_if_due()
