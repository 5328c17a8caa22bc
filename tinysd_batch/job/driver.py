"""Run a job: hand chunks of micro-batches to workers, and write down what becomes of every image."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from tinysd_batch.errors import ManifestError, UsageError
from tinysd_batch.job.dispatch.dispatcher import Dispatcher
from tinysd_batch.job.dispatch.job_progress import InvalidRows, JobProgress, RunSummary
from tinysd_batch.job.manifest.files import read_manifest_stamp
from tinysd_batch.job.manifest.readers import is_json_manifest, read_extra_fields
from tinysd_batch.job.manifest.reading_notes import ReadingNotes
from tinysd_batch.job.manifest.snapshot import SnapshotWriter
from tinysd_batch.job.plan.batches import cut_batches, plan_images
from tinysd_batch.job.results.compare import find_differences, find_images_to_redo
from tinysd_batch.job.results.rows import make_invalid_row, parse_invalid_row
from tinysd_batch.job.results.schema import build_results_schema, keep_earlier_columns
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.job_json import save_job
from tinysd_batch.job.state.open_job import JOB_FILE, check_job_unchanged
from tinysd_batch.job.state.precision_record import record_precision_from_results
from tinysd_batch.job.state.reuse import reuse_images
from tinysd_batch.job.state.undo import find_missing_folders, remove_job_state, undo_job_start
from tinysd_batch.job.workers.pool import PoolFactory
from tinysd_batch.records import InvalidRow, MicroBatch, Status
from tinysd_batch.storage.atomic import remove_temporaries
from tinysd_batch.storage.lock import FileLock, hold_lock

__all__ = ["JobProgress", "PoolFactory", "RunSummary", "run_job"]

MAX_EXTRA_COLUMNS = 500  # different ones of a JSONL file, of which each becomes a column


@dataclass(slots=True)
class ManifestScan:
    """What a first pass over the manifest found."""

    images: int
    invalid: InvalidRows
    extra: list[str]  # names of the columns we do not know, in the order they came
    kept: SnapshotWriter | None  # all rows, if the job folder does not hold them all
    appended_rows: int = 0  # since the last run
    corrected_rows: int = 0  # that had a fault in the last run and can be generated now
    notes: ReadingNotes = field(default_factory=ReadingNotes)  # on the manifest, where it was read


def scan_manifest(job: Job) -> ManifestScan:
    """Read the whole manifest once, so that its faults show before anything heavy starts."""
    kept = SnapshotWriter() if job.needs_snapshot else None
    found = ManifestScan(0, InvalidRows(), [], kept)
    merger = job.create_merger() if job.manifest_record is not None and job.may_have_new_rows else None
    names: dict[str, None] = {}
    for row in (
        merger.merge(job.read_manifest(found.notes), kept) if merger else job.read_rows_with_own_seeds(found.notes)
    ):
        if kept is not None and not merger:
            kept.add(row)
        if isinstance(row, InvalidRow):
            found.invalid.add(row)
        else:
            found.images += row.n_iter * row.n_samples
        names.update(dict.fromkeys(row.extra))
        if len(names) > MAX_EXTRA_COLUMNS and is_json_manifest(job.manifest):
            raise ManifestError(f"{job.manifest}: over {MAX_EXTRA_COLUMNS} different keys besides the known ones")
    found.extra.extend(names)
    if merger:
        found.appended_rows, found.corrected_rows = merger.appended, merger.corrected
    return found


def restore_manifest_scan(job: Job) -> ManifestScan | None:
    """What the first pass of an earlier run found in the same manifest; None where not all of that is known."""
    record = job.manifest_record
    if record is None or job.needs_snapshot:
        return None
    invalid = InvalidRows()
    if record.invalid_rows:
        for row in read_recorded_invalid_rows(job):
            invalid.add(row)
    if invalid.count != record.invalid_rows:
        return None
    return ManifestScan(record.images, invalid, list(record.extra_columns or ()), None)


def read_recorded_invalid_rows(job: Job) -> Iterator[InvalidRow]:
    """Those that the results name, the first time each is met."""
    seen: set[int] = set()
    columns = ["row", "index", "id", "prompt", "status", "error_message"]
    for table in ResultsTable(job.folder).read(columns):
        for row in table.filter(table["index"].is_null()).to_pylist():
            if row["status"] == Status.INVALID and row["row"] not in seen:
                seen.add(row["row"])
                yield parse_invalid_row(row)


def run_job(
    job: Job, open_pool: PoolFactory, progress: JobProgress, should_stop: Callable[[], bool], limit: int | None = None,
    *, retry_failed: bool = False, take_over: bool = False, redo_missing: bool = False,
) -> RunSummary:  # fmt: skip
    """Make every image of the job (or the first `limit`) that is not finished. `open_pool` gets the number to make.

    `retry_failed`: images that failed or were quarantined are not finished. `take_over`: the job is taken from a driver
    that has it and does not give it up. `redo_missing`: images whose files are gone are generated again even where that
    is more than half of them.
    """
    started = time.monotonic()
    surveyed = scan_manifest(job) if job.needs_snapshot else None
    if surveyed is not None and read_manifest_stamp(job.manifest) != job.manifest_stamp:
        raise ManifestError(f"{job.manifest}: changed while it was read; try again")
    new_folders = find_missing_folders(job.folder)
    with hold_lock(job.state_folder / "lock", take_over) as held:
        check_job_unchanged(job)
        is_new = job.replaces_unstarted_job or not (job.folder / JOB_FILE).exists()
        if job.replaces_unstarted_job:
            with held.guard():
                remove_job_state(job)
        run = JobRun(job, surveyed or restore_manifest_scan(job) or scan_manifest(job), held, progress, should_stop)
        try:
            summary = run.execute(open_pool, limit, retry_failed, redo_missing)
        except UsageError:
            if is_new and not read_finished_images(job).images:
                with held.guard():
                    undo_job_start(job, new_folders)
            raise
    summary.seconds = time.monotonic() - started
    return summary


@dataclass(slots=True)
class JobRun:
    """One run of a job, under the job's lock."""

    job: Job
    scan: ManifestScan
    job_lock: FileLock
    progress: JobProgress
    should_stop: Callable[[], bool]

    def execute(self, open_pool: PoolFactory, limit: int | None, retry_failed: bool, redo_missing: bool) -> RunSummary:
        job, surveyed = self.job, self.scan
        to_redo = find_images_to_redo(job.folder, redo_missing)
        total = min(surveyed.images, limit) if limit else surveyed.images
        self.clean_up()
        self.report_manifest_notes()
        as_text = job.manifest_record is not None and job.manifest_record.columns_as_text
        schema = build_results_schema(read_extra_fields(job.manifest, surveyed.extra, as_text=as_text))
        schema = keep_earlier_columns(schema, ResultsTable(job.folder).read_schemas())
        writer = ResultsWriter(job.folder, schema, surveyed.images + surveyed.invalid.count, self.job_lock.guard)
        done = read_finished_images(job)
        if retry_failed:
            self.requeue_failed(done)
        if any(index <= total for index in to_redo.indexes):
            self.progress.note(f"Generating images again: {to_redo}")
        done.images -= to_redo.indexes
        finished = {index for index in done.images if 1 <= index <= total}
        summary = RunSummary(
            total, len(finished), surveyed.invalid.count, failed_before=len(done.failed & finished),
            beyond_limit=surveyed.images - total,
        )  # fmt: skip
        with self.job_lock.guard():
            job = self.job = save_job(job, surveyed.images, surveyed.invalid.count, surveyed.extra, surveyed.kept)
        corrected = write_invalid_rows(job, surveyed.invalid, done.invalid_rows, writer)
        try:
            self.reuse(summary, finished, writer)
            self.progress.report_start(total, len(finished), surveyed.invalid)
            if summary.left and not self.should_stop():
                self.generate_images(open_pool, summary, finished, writer)
        finally:
            self.clean_up()  # a killed worker cannot
            self.flush(writer)
            writer.seal()
            if retry_failed or done.has_superseded_rows or corrected or to_redo.indexes:
                writer.delete_superseded_rows(corrected)
        self.discount_lost_images(summary)
        summary.stopped = bool(summary.left)
        return summary

    def report_manifest_notes(self) -> None:
        """Say what was noticed about the manifest, and how it has grown since the last run."""
        for line in self.scan.notes.lines():
            self.progress.note(f"{self.job.manifest.name}: {line}")
        appended, corrected = self.scan.appended_rows, self.scan.corrected_rows
        if appended:
            self.progress.note(f"The manifest has grown by {appended:,} row{'s' * (appended != 1)}")
        if corrected:
            rows, images = ("row", "its images come") if corrected == 1 else ("rows", "their images come")
            self.progress.note(
                f"{corrected:,} {rows} of the manifest, faulty or blank before, can be generated now; {images} last"
            )

    def discount_lost_images(self, summary: RunSummary) -> None:
        """Count images as left whose files somebody deleted or cut short while the run went on."""
        if not summary.counts[Status.OK]:
            return
        lost = find_differences(self.job.folder, self.job.run_id)
        if lost.indexes:
            self.progress.note(f"Deleted or changed while the job ran: {lost}")
            summary.counts[Status.OK] -= min(len(lost.indexes), summary.counts[Status.OK])

    def clean_up(self) -> None:
        with self.job_lock.guard():
            clean_up_job_folder(self.job)

    def requeue_failed(self, done: "FinishedImages") -> None:
        failed = len(done.failed)
        images = f"{failed:,} failed image{'s' * (failed != 1)}"
        self.progress.note(f"Trying {images} again" if failed else "No failed image to try again")
        done.images -= done.failed
        done.failed.clear()

    def reuse(self, summary: RunSummary, finished: set[int], writer: ResultsWriter) -> None:
        """Take pictures over from the job that `--reuse` named."""
        if self.job.reuse is None or not summary.left:
            return
        images = (
            image for _, images in plan_images(self.job.read_rows(), self.job.shared_settings()) for image in images
        )
        wanted = (image for image in images if image.index <= summary.total and image.index not in finished)
        taken = reuse_images(self.job, self.job.reuse, wanted, writer, self.progress, self.should_stop)
        finished |= taken
        summary.reused = len(taken)
        summary.finished_before += len(taken)

    def generate_images(
        self, open_pool: PoolFactory, summary: RunSummary, finished: set[int], writer: ResultsWriter
    ) -> None:
        if self.job.settings.precision == "auto":
            with self.job_lock.guard():
                record_precision_from_results(self.job.precision_file, ResultsTable(self.job.folder))
        batches = takewhile(
            lambda batch: batch.images[0].index <= summary.total, plan_remaining_batches(self.job, finished)
        )
        with open_pool(summary.left) as pool:
            work = limit_batches(batches, summary.total)
            try:
                Dispatcher(self.job, pool, writer, self.progress, summary, work).run(self.should_stop)
            finally:
                self.flush(writer)  # Ray takes a second or two to end

    def flush(self, writer: ResultsWriter) -> None:
        if writer.flush():
            self.progress.report_flush()


def clean_up_job_folder(job: Job) -> None:
    """Remove unfinished files, and the file that tells workers to stop."""
    paths = ResultsTable(job.folder)
    remove_temporaries(job.folder, job.state_folder, job.scratch, paths.journal, paths.parts_folder)
    job.stop_file.unlink(missing_ok=True)


def plan_remaining_batches(job: Job, finished: set[int]) -> Iterator[MicroBatch]:
    return cut_batches(plan_images(job.read_rows(), job.shared_settings()), finished, job.settings.max_batch)


def limit_batches(batches: Iterable[MicroBatch], last_index: int) -> Iterator[MicroBatch]:
    """The batches without images past `last_index`, which still ride along."""
    for batch in batches:
        wanted = frozenset(index for index in batch.wanted if index <= last_index)
        if wanted:
            yield MicroBatch(batch.images, wanted)


@dataclass(slots=True)
class FinishedImages:
    """What the results say of earlier runs."""

    images: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    invalid_rows: set[int] = field(default_factory=set)
    has_superseded_rows: bool = False  # images were tried again, and their older rows are still there


def read_finished_images(job: Job) -> FinishedImages:
    """Of an image's rows the newest counts, which is read last."""
    finished = FinishedImages()
    for table in ResultsTable(job.folder).read(["index", "row", "status"]):
        indexes, rows, statuses = (table[name].to_pylist() for name in ("index", "row", "status"))
        for index, row, status in zip(indexes, rows, statuses, strict=True):
            if index is None:
                finished.invalid_rows.add(row)
            else:
                finished.has_superseded_rows = finished.has_superseded_rows or index in finished.images
                finished.images.add(index)
                (finished.failed.discard if status == Status.OK else finished.failed.add)(index)
    return finished


def write_invalid_rows(job: Job, invalid: InvalidRows, written: set[int], writer: ResultsWriter) -> set[int]:
    """Write a row of the table for each that has none yet; return those of `written` that have no fault any more.

    Of many only the first are in memory.
    """
    corrected = set(written)
    rows = (
        invalid.first if invalid.are_all_in_memory else (row for row in job.read_rows() if isinstance(row, InvalidRow))
    )
    for row in rows:
        if row.number not in written:
            writer.append(make_invalid_row(row, job.run_columns()))
            writer.flush_if_due()
        corrected.discard(row.number)
    return corrected
