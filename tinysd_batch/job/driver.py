"""Run a job: hand chunks of micro-batches to workers, and write down what becomes of every image."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from tinysd_batch.errors import ManifestError, UsageError
from tinysd_batch.job.dispatch.dispatcher import Dispatch
from tinysd_batch.job.dispatch.job_progress import InvalidRows, Progress, Summary
from tinysd_batch.job.manifest.files import stamp
from tinysd_batch.job.manifest.readers import is_jsonl, read_extra_fields
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.snapshot import RowKeeper
from tinysd_batch.job.plan.batches import cut_batches, plan_images
from tinysd_batch.job.results.compare import find_differences, find_images_to_redo
from tinysd_batch.job.results.rows import invalid_row, read_invalid_row
from tinysd_batch.job.results.schema import keep_columns, results_schema
from tinysd_batch.job.results.table import ResultsPaths
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.job_json import save_job
from tinysd_batch.job.state.open_job import JOB_FILE, check_still_same_job
from tinysd_batch.job.state.precision_record import record_earlier
from tinysd_batch.job.state.reuse import reuse_pictures
from tinysd_batch.job.state.undo import missing_folders, remove_state, take_back
from tinysd_batch.job.workers.pool import PoolFactory
from tinysd_batch.records import InvalidRow, MicroBatch, Status
from tinysd_batch.storage.atomic import sweep_temporaries
from tinysd_batch.storage.lock import Lock, lock

__all__ = ["PoolFactory", "Progress", "Summary", "run_job"]

MAX_KEYS = 500  # different ones of a JSONL file, of which each becomes a column


@dataclass(slots=True)
class Survey:
    """What a first pass over the manifest found."""

    images: int
    invalid: InvalidRows
    extra: list[str]  # names of the columns we do not know, in the order they came
    kept: RowKeeper | None  # all rows, if the job folder does not hold them all
    appended_rows: int = 0  # since the last run
    corrected_rows: int = 0  # that had a fault in the last run and can be generated now
    notes: ReadingNotes = field(default_factory=ReadingNotes)  # on the manifest, where it was read


def survey(job: Job) -> Survey:
    """Read the whole manifest once, so that its faults show before anything heavy starts."""
    kept = RowKeeper() if job.needs_snapshot else None
    found = Survey(0, InvalidRows(), [], kept)
    merger = job.merger() if job.record is not None and job.has_new_rows else None
    names: dict[str, None] = {}
    for row in merger.merge(job.read_manifest(found.notes), kept) if merger else job.read_own_rows(found.notes):
        if kept is not None and not merger:
            kept.add(row)
        if isinstance(row, InvalidRow):
            found.invalid.add(row)
        else:
            found.images += row.n_iter * row.n_samples
        names.update(dict.fromkeys(row.extra))
        if len(names) > MAX_KEYS and is_jsonl(job.manifest):
            raise ManifestError(f"{job.manifest}: over {MAX_KEYS} different keys besides the known ones")
    found.extra.extend(names)
    if merger:
        found.appended_rows, found.corrected_rows = merger.appended, merger.corrected
    return found


def remembered(job: Job) -> Survey | None:
    """What the first pass of an earlier run found in the same manifest; None where not all of that is known."""
    record = job.record
    if record is None or job.needs_snapshot:
        return None
    invalid = InvalidRows()
    if record.invalid_rows:
        for row in read_invalid_rows(job):
            invalid.add(row)
    if invalid.count != record.invalid_rows:
        return None
    return Survey(record.images, invalid, list(record.columns or ()), None)


def read_invalid_rows(job: Job) -> Iterator[InvalidRow]:
    """Those that the results name, the first time each is met."""
    seen: set[int] = set()
    columns = ["row", "index", "id", "prompt", "status", "error_message"]
    for table in ResultsPaths(job.folder).read(columns):
        for row in table.filter(table["index"].is_null()).to_pylist():
            if row["status"] == Status.INVALID and row["row"] not in seen:
                seen.add(row["row"])
                yield read_invalid_row(row)


def run_job(
    job: Job, open_pool: PoolFactory, progress: Progress, should_stop: Callable[[], bool], limit: int | None = None,
    *, retry_failed: bool = False, take_over: bool = False, redo_missing: bool = False,
) -> Summary:  # fmt: skip
    """Make every image of the job (or the first `limit`) that is not finished. `open_pool` gets the number to make.

    `retry_failed`: images that failed or were quarantined are not finished. `take_over`: the job is taken from a driver
    that has it and does not give it up. `redo_missing`: images whose files are gone are generated again even where that
    is more than half of them.
    """
    started = time.monotonic()
    surveyed = survey(job) if job.needs_snapshot else None
    if surveyed is not None and stamp(job.manifest) != job.manifest_stamp:
        raise ManifestError(f"{job.manifest}: changed while it was read; try again")
    new_folders = missing_folders(job.folder)
    with lock(job.state / "lock", take_over) as held:
        check_still_same_job(job)
        is_new = job.begins_anew or not (job.folder / JOB_FILE).exists()
        if job.begins_anew:
            with held.guard():
                remove_state(job)
        run = Run(job, surveyed or remembered(job) or survey(job), held, progress, should_stop)
        try:
            summary = run.make(open_pool, limit, retry_failed, redo_missing)
        except UsageError:
            if is_new and not read_finished(job).images:
                with held.guard():
                    take_back(job, new_folders)
            raise
    summary.seconds = time.monotonic() - started
    return summary


@dataclass(slots=True)
class Run:
    """One run of a job, under the job's lock."""

    job: Job
    surveyed: Survey
    held: Lock
    progress: Progress
    should_stop: Callable[[], bool]

    def make(self, open_pool: PoolFactory, limit: int | None, retry_failed: bool, redo_missing: bool) -> Summary:
        job, surveyed = self.job, self.surveyed
        to_redo = find_images_to_redo(job.folder, redo_missing)
        total = min(surveyed.images, limit) if limit else surveyed.images
        self.clean()
        self.note_reading()
        as_text = job.record is not None and job.record.columns_as_text
        schema = results_schema(read_extra_fields(job.manifest, surveyed.extra, as_text=as_text))
        schema = keep_columns(schema, ResultsPaths(job.folder).schemas())
        writer = ResultsWriter(job.folder, schema, surveyed.images + surveyed.invalid.count, self.held.guard)
        done = read_finished(job)
        if retry_failed:
            self.forget_failed(done)
        if any(index <= total for index in to_redo.indexes):
            self.progress.note(f"Generating images again: {to_redo}")
        done.images -= to_redo.indexes
        finished = {index for index in done.images if 1 <= index <= total}
        summary = Summary(
            total, len(finished), surveyed.invalid.count, failed_before=len(done.failed & finished),
            beyond_limit=surveyed.images - total,
        )  # fmt: skip
        with self.held.guard():
            job = self.job = save_job(job, surveyed.images, surveyed.invalid.count, surveyed.extra, surveyed.kept)
        corrected = write_invalid_rows(job, surveyed.invalid, done.invalid_rows, writer)
        try:
            self.reuse(summary, finished, writer)
            self.progress.started(total, len(finished), surveyed.invalid)
            if summary.left and not self.should_stop():
                self.draw(open_pool, summary, finished, writer)
        finally:
            self.clean()  # a killed worker cannot
            self.flush(writer)
            writer.seal()
            if retry_failed or done.doubled or corrected or to_redo.indexes:
                writer.drop_superseded(corrected)
        self.check_written(summary)
        summary.stopped = bool(summary.left)
        return summary

    def note_reading(self) -> None:
        """Say what was noticed about the manifest, and how it has grown since the last run."""
        for line in self.surveyed.notes.lines():
            self.progress.note(f"{self.job.manifest.name}: {line}")
        appended, corrected = self.surveyed.appended_rows, self.surveyed.corrected_rows
        if appended:
            self.progress.note(f"The manifest has grown by {appended:,} row{'s' * (appended != 1)}")
        if corrected:
            rows, images = ("row", "its images come") if corrected == 1 else ("rows", "their images come")
            self.progress.note(
                f"{corrected:,} {rows} of the manifest, faulty or blank before, can be generated now; {images} last"
            )

    def check_written(self, summary: Summary) -> None:
        """Count images as left whose files somebody deleted or cut short while the run went on."""
        if not summary.counts[Status.OK]:
            return
        lost = find_differences(self.job.folder, self.job.run_id)
        if lost.indexes:
            self.progress.note(f"Deleted or changed while the job ran: {lost}")
            summary.counts[Status.OK] -= min(len(lost.indexes), summary.counts[Status.OK])

    def clean(self) -> None:
        with self.held.guard():
            sweep(self.job)

    def forget_failed(self, done: "Finished") -> None:
        failed = len(done.failed)
        images = f"{failed:,} failed image{'s' * (failed != 1)}"
        self.progress.note(f"Trying {images} again" if failed else "No failed image to try again")
        done.images -= done.failed
        done.failed.clear()

    def reuse(self, summary: Summary, finished: set[int], writer: ResultsWriter) -> None:
        """Take pictures over from the job that `--reuse` named."""
        if self.job.reuse is None or not summary.left:
            return
        images = (image for _, images in plan_images(self.job.read_rows(), self.job.common()) for image in images)
        wanted = (image for image in images if image.index <= summary.total and image.index not in finished)
        taken = reuse_pictures(self.job, self.job.reuse, wanted, writer, self.progress, self.should_stop)
        finished |= taken
        summary.reused = len(taken)
        summary.finished_before += len(taken)

    def draw(self, open_pool: PoolFactory, summary: Summary, finished: set[int], writer: ResultsWriter) -> None:
        if self.job.settings.precision == "auto":
            with self.held.guard():
                record_earlier(self.job.precision_file, ResultsPaths(self.job.folder))
        batches = takewhile(lambda batch: batch.images[0].index <= summary.total, todo(self.job, finished))
        with open_pool(summary.left) as pool:
            work = within(batches, summary.total)
            try:
                Dispatch(self.job, pool, writer, self.progress, summary, work).run(self.should_stop)
            finally:
                self.flush(writer)  # Ray takes a second or two to end

    def flush(self, writer: ResultsWriter) -> None:
        if writer.flush():
            self.progress.durable()


def sweep(job: Job) -> None:
    """Remove unfinished files, and the file that tells workers to stop."""
    paths = ResultsPaths(job.folder)
    sweep_temporaries(job.folder, job.state, job.scratch, paths.journal, paths.parts_folder)
    job.stop_file.unlink(missing_ok=True)


def todo(job: Job, finished: set[int]) -> Iterator[MicroBatch]:
    return cut_batches(plan_images(job.read_rows(), job.common()), finished, job.settings.max_batch)


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
    doubled: bool = False  # images were tried again, and their older rows are still there


def read_finished(job: Job) -> Finished:
    """Of an image's rows the newest counts, which is read last."""
    finished = Finished()
    for table in ResultsPaths(job.folder).read(["index", "row", "status"]):
        indexes, rows, statuses = (table[name].to_pylist() for name in ("index", "row", "status"))
        for index, row, status in zip(indexes, rows, statuses, strict=True):
            if index is None:
                finished.invalid_rows.add(row)
            else:
                finished.doubled = finished.doubled or index in finished.images
                finished.images.add(index)
                (finished.failed.discard if status == Status.OK else finished.failed.add)(index)
    return finished


def write_invalid_rows(job: Job, invalid: InvalidRows, written: set[int], writer: ResultsWriter) -> set[int]:
    """Write a row of the table for each that has none yet; return those of `written` that have no fault any more.

    Of many only the first are in memory.
    """
    corrected = set(written)
    rows = invalid.first if invalid.are_all_shown else (row for row in job.read_rows() if isinstance(row, InvalidRow))
    for row in rows:
        if row.number not in written:
            writer.append(invalid_row(row, job.run_columns()))
            writer.flush_if_due()
        corrected.discard(row.number)
    return corrected
