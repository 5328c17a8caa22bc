"""Run a job: dispatch chunks of micro-batches to workers and record the result of every image."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from tinysd_batch.errors import ManifestError, UsageError
from tinysd_batch.job.dispatch.dispatcher import Dispatcher
from tinysd_batch.job.dispatch.job_progress import InvalidRows, JobProgress, RunSummary
from tinysd_batch.job.dispatch.logged_progress import LoggedProgress
from tinysd_batch.job.job_log import write_job_log
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
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.job_json import save_job
from tinysd_batch.job.state.open_job import check_job_unchanged
from tinysd_batch.job.state.precision_record import record_precision_from_results
from tinysd_batch.job.state.reuse import reuse_images
from tinysd_batch.job.state.undo import find_missing_folders, remove_job_state, undo_job_start
from tinysd_batch.job.workers.pool import PoolFactory
from tinysd_batch.records import InvalidRow, MicroBatch, Status
from tinysd_batch.storage.atomic import remove_temporaries
from tinysd_batch.storage.lock import FileLock, hold_lock
from tinysd_batch.version import __version__

logger = logging.getLogger(__name__)
__all__ = ["JobProgress", "PoolFactory", "RunSummary", "run_job"]

MAX_EXTRA_COLUMNS = 500  # in a JSONL manifest, where each different key becomes a column


@dataclass(slots=True)
class ManifestScan:
    """Result of reading the whole manifest once."""

    images: int
    invalid: InvalidRows
    extra_columns: list[str]  # names of columns that are not settings, in order of appearance
    snapshot: SnapshotWriter | None  # all rows, if the job folder does not have them all
    appended_rows: int = 0  # since the last run
    corrected_rows: int = 0  # invalid or blank in the last run, valid now
    notes: ReadingNotes = field(default_factory=ReadingNotes)  # remarks on the manifest, if it was read


def scan_manifest(job: Job) -> ManifestScan:
    """Read the whole manifest once, to report its errors before workers start.

    Raises:
        ManifestError: The manifest cannot be read, or has too many different keys.
    """
    snapshot = SnapshotWriter() if job.needs_snapshot else None
    scan = ManifestScan(0, InvalidRows(), [], snapshot)
    merger = job.create_merger() if job.manifest_record is not None and job.may_have_new_rows else None
    if merger:
        rows = merger.merge(job.read_manifest(scan.notes), snapshot)
    else:
        rows = job.read_rows_with_own_seeds(scan.notes)
    names: dict[str, None] = {}
    for row in rows:
        if snapshot is not None and not merger:
            snapshot.add(row)
        if isinstance(row, InvalidRow):
            scan.invalid.add(row)
        else:
            scan.images += row.n_images
        names.update(dict.fromkeys(row.extra))
        if len(names) > MAX_EXTRA_COLUMNS and is_json_manifest(job.manifest):
            raise ManifestError(f"{job.manifest}: over {MAX_EXTRA_COLUMNS} different keys besides the known ones")
    scan.extra_columns.extend(names)
    if merger:
        scan.appended_rows, scan.corrected_rows = merger.appended, merger.corrected
    return scan


def restore_manifest_scan(job: Job) -> ManifestScan | None:
    """Return what an earlier run found in the same manifest, or None if not all of it is recorded."""
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
    """Yield each invalid row that the results table contains, once."""
    seen: set[int] = set()
    columns = ["row", "index", "id", "prompt", "status", "error_message"]
    for table in ResultsTable(job.folder).read(columns):
        for row in table.filter(table["index"].is_null()).to_pylist():
            if row["status"] == Status.INVALID and row["row"] not in seen:
                seen.add(row["row"])
                yield parse_invalid_row(row)


def run_job(
    job: Job,
    open_pool: PoolFactory,
    progress: JobProgress,
    should_stop: Callable[[], bool],
    limit: int | None = None,
    *,
    retry_failed: bool = False,
    take_over: bool = False,
    redo_missing: bool = False,
) -> RunSummary:
    """Generate every image of the job that is not finished.

    Args:
        job: The job, from `open_job`.
        open_pool: Opens the workers; gets the number of images to generate.
        progress: Receives events and messages.
        should_stop: Returns True once the run is to stop.
        limit: Generate only the first `limit` images of the job.
        retry_failed: Generate failed and quarantined images again.
        take_over: Take the job over from a driver that holds it and does not stop.
        redo_missing: Generate images with missing files again even if that is more than half of them.

    Raises:
        TinySDError: The run could not start or continue. Finished images are saved and the job can be resumed.
    """
    started = time.monotonic()
    scan = scan_manifest(job) if job.needs_snapshot else None
    if scan is not None and read_manifest_stamp(job.manifest) != job.manifest_stamp:
        raise ManifestError(f"{job.manifest}: changed while it was read; try again")
    new_folders = find_missing_folders(job.folder)
    with hold_lock(job.state_folder / "lock", take_over) as job_lock:
        check_job_unchanged(job)
        is_new = job.replaces_unstarted_job or not (job.folder / JOB_FILE).exists()
        if job.replaces_unstarted_job:
            with job_lock.guard():
                remove_job_state(job)
        scan = scan or restore_manifest_scan(job) or scan_manifest(job)
        run = JobRun(job, scan, job_lock, LoggedProgress(progress), should_stop)
        try:
            with write_job_log(job.state_folder):
                logger.debug("run %s of tinysd-batch %s", job.run_id, __version__)
                summary = run.execute(open_pool, limit, retry_failed, redo_missing)
                logger.debug("%d images left, %d failed", summary.left, summary.failed)
        except UsageError:
            if is_new and not read_finished_images(job).images:
                with job_lock.guard():
                    undo_job_start(job, new_folders)
            raise
    summary.seconds = time.monotonic() - started
    return summary


@dataclass(slots=True)
class JobRun:
    """One run of a job, while the job's lock is held."""

    job: Job
    scan: ManifestScan
    job_lock: FileLock
    progress: JobProgress
    should_stop: Callable[[], bool]

    def execute(self, open_pool: PoolFactory, limit: int | None, retry_failed: bool, redo_missing: bool) -> RunSummary:
        """Generate the images that are not finished; see `run_job` for the arguments."""
        job, scan = self.job, self.scan
        to_redo = find_images_to_redo(job.folder, redo_missing)
        total = min(scan.images, limit) if limit else scan.images
        self.clean_up()
        self.report_manifest_notes()
        writer = self.open_writer()
        earlier = read_finished_images(job)
        if retry_failed:
            self.requeue_failed(earlier)
        if any(index <= total for index in to_redo.indexes):
            self.progress.note(f"Generating images again: {to_redo}")
        earlier.images -= to_redo.indexes
        finished = {index for index in earlier.images if 1 <= index <= total}
        summary = RunSummary(
            total,
            len(finished),
            scan.invalid.count,
            failed_before=len(earlier.failed & finished),
            beyond_limit=scan.images - total,
        )
        with self.job_lock.guard():
            job = self.job = save_job(job, scan.images, scan.invalid.count, scan.extra_columns, scan.snapshot)
        corrected = write_invalid_rows(job, scan.invalid, earlier.invalid_rows, writer)
        try:
            self.take_over_images(summary, finished, writer)
            self.progress.report_start(total, len(finished), scan.invalid)
            if summary.left and not self.should_stop():
                self.generate_images(open_pool, summary, finished, writer)
        finally:
            self.clean_up()  # killed workers leave temporary files
            self.flush(writer)
            writer.seal()
            if retry_failed or earlier.has_superseded_rows or corrected or to_redo.indexes:
                writer.delete_superseded_rows(corrected)
        self.discount_lost_images(summary)
        summary.stopped = bool(summary.left)
        return summary

    def open_writer(self) -> ResultsWriter:
        """Open the results table for writing, with the columns of the manifest and of earlier runs."""
        job, scan = self.job, self.scan
        as_text = job.manifest_record is not None and job.manifest_record.columns_as_text
        schema = build_results_schema(read_extra_fields(job.manifest, scan.extra_columns, as_text=as_text))
        schema = keep_earlier_columns(schema, ResultsTable(job.folder).read_schemas())
        return ResultsWriter(job.folder, schema, scan.images + scan.invalid.count, self.job_lock.guard)

    def report_manifest_notes(self) -> None:
        """Report remarks on the manifest, and how it has changed since the last run."""
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
        """Count images as not generated whose files were deleted or truncated during the run."""
        if not summary.counts[Status.OK]:
            return
        lost = find_differences(self.job.folder, self.job.run_id)
        if lost.indexes:
            self.progress.note(f"Deleted or changed while the job ran: {lost}")
            summary.counts[Status.OK] -= min(len(lost.indexes), summary.counts[Status.OK])

    def clean_up(self) -> None:
        """Run `clean_up_job_folder` unless another driver has taken the job over."""
        with self.job_lock.guard():
            clean_up_job_folder(self.job)

    def requeue_failed(self, earlier: "FinishedImages") -> None:
        """Remove failed images from those that are finished, so that they are generated again."""
        failed = len(earlier.failed)
        images = f"{failed:,} failed image{'s' * (failed != 1)}"
        self.progress.note(f"Trying {images} again" if failed else "No failed image to try again")
        earlier.images -= earlier.failed
        earlier.failed.clear()

    def take_over_images(self, summary: RunSummary, finished: set[int], writer: ResultsWriter) -> None:
        """Reuse images of the job that the user named with `--reuse`, and add them to `finished`."""
        if self.job.reuse is None or not summary.left:
            return
        planned = plan_images(self.job.read_rows(), self.job.shared_settings())
        images = (image for _, row_images in planned for image in row_images)
        wanted = (image for image in images if image.index <= summary.total and image.index not in finished)
        reused = reuse_images(self.job, self.job.reuse, wanted, writer, self.progress, self.should_stop)
        finished |= reused
        summary.reused = len(reused)
        summary.finished_before += len(reused)

    def generate_images(
        self, open_pool: PoolFactory, summary: RunSummary, finished: set[int], writer: ResultsWriter
    ) -> None:
        """Open the workers and dispatch the remaining micro-batches to them."""
        if self.job.settings.precision == "auto":
            with self.job_lock.guard():
                record_precision_from_results(self.job.precision_file, ResultsTable(self.job.folder))
        batches = limit_batches(plan_remaining_batches(self.job, finished), summary.total)
        with open_pool(summary.left) as pool:
            try:
                Dispatcher(self.job, pool, writer, self.progress, summary, batches).run(self.should_stop)
            finally:
                self.flush(writer)  # before the pool closes, as Ray takes a second or two to shut down

    def flush(self, writer: ResultsWriter) -> None:
        """Write all buffered rows, and report that they are durable."""
        if writer.flush():
            self.progress.report_flush()


def clean_up_job_folder(job: Job) -> None:
    """Remove temporary files, and the file that makes workers stop."""
    table = ResultsTable(job.folder)
    remove_temporaries(job.folder, job.state_folder, job.scratch, table.journal, table.parts_folder)
    job.stop_file.unlink(missing_ok=True)


def plan_remaining_batches(job: Job, finished: set[int]) -> Iterator[MicroBatch]:
    """Yield the micro-batches that have images not in `finished`."""
    return cut_batches(plan_images(job.read_rows(), job.shared_settings()), finished, job.settings.max_batch)


def limit_batches(batches: Iterable[MicroBatch], last_index: int) -> Iterator[MicroBatch]:
    """Yield the batches up to `last_index`, in which later images are not wanted.

    A batch that contains later images keeps them, as the composition of a batch must not depend on the limit.
    """
    for batch in takewhile(lambda batch: batch.images[0].index <= last_index, batches):
        wanted = frozenset(index for index in batch.wanted if index <= last_index)
        if wanted:
            yield MicroBatch(batch.images, wanted)


@dataclass(slots=True)
class FinishedImages:
    """Images and invalid rows that the results table contains."""

    images: set[int] = field(default_factory=set)  # indexes of all images, including failed ones
    failed: set[int] = field(default_factory=set)  # indexes of failed images
    invalid_rows: set[int] = field(default_factory=set)  # manifest row numbers
    has_superseded_rows: bool = False  # whether an image has more than one row


def read_finished_images(job: Job) -> FinishedImages:
    """Read which images are finished. Of several rows of an image the newest counts, which is read last."""
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
    """Write a row of the results table for each invalid manifest row that has none.

    Args:
        job: The job. Its rows are read again if there are too many invalid ones to be in memory.
        invalid: Invalid rows of the manifest.
        written: Numbers of the manifest rows that the results table has as invalid.
        writer: Writer of the results table.

    Returns:
        The numbers in `written` whose rows are no longer invalid.
    """
    corrected = set(written)
    all_rows = (row for row in job.read_rows() if isinstance(row, InvalidRow))
    for row in invalid.first if invalid.are_all_in_memory else all_rows:
        if row.number not in written:
            writer.append(make_invalid_row(row, job.run_columns()))
            writer.flush_if_due()
        corrected.discard(row.number)
    return corrected
