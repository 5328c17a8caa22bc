"""Run a job: hand chunks of micro-batches to workers, and write down what becomes of every image."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

from tinysd_batch.errors import ManifestError, UsageError
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
from tinysd_batch.job.plan import cut_batches, plan_images, split_to_singles
from tinysd_batch.job.pool import BatchDone, ChunkDone, Event, Pool, WorkerLost, WorkerReady
from tinysd_batch.job.results import ResultsPaths, ResultsWriter, image_row, invalid_row, results_schema
from tinysd_batch.job.reuse import reuse_pictures
from tinysd_batch.job.rows import RowKeeper
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, MicroBatch, Row, Status
from tinysd_batch.storage import Lock, lock, storage_errors, sweep_temporaries

CHUNK_TARGET_S = 15.0
MAX_DEATHS = 3  # a worker lost with the same image three times: the image is quarantined
MAX_FRESH_DEATHS = 4  # a worker lost so often in a row, each time with an image new to it: the worker is retired
GRACE_S = 30.0  # how long a stop waits for the micro-batches in flight
POLL_S = 0.5
STAT_EVERY_ROWS = 64
MAX_KEYS = 500  # different ones of a JSONL file, of which each becomes a column
CHANGED = "changed while the job ran; bring back what it was to go on, or give the new one a folder of its own with -o"


class Progress(Protocol):
    """Who is told how the run goes."""

    def started(self, total: int, finished: int, invalid: list[InvalidRow]) -> None: ...
    def worker(self, event: WorkerReady | WorkerLost) -> None: ...
    def image(self, request: ImageRequest, result: ImageResult) -> None: ...
    def note(self, line: str) -> None:
        """Something worth knowing about the whole run."""
        ...

    def durable(self) -> None:
        """All images told of so far will survive anything."""
        ...


@dataclass(slots=True)
class Summary:
    """How a run ended."""

    total: int  # images in the job, or up to --limit
    finished_before: int
    invalid_rows: int
    counts: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))  # of this run
    failed_before: int = 0
    reused: int = 0  # of `finished_before`, taken over from another job in this run
    stopped: bool = False
    seconds: float = 0.0

    @property
    def left(self) -> int:
        return self.total - self.finished_before - sum(self.counts.values())

    @property
    def failed(self) -> int:
        return self.failed_before + self.counts[Status.FAILED] + self.counts[Status.QUARANTINED]


@dataclass(slots=True)
class Survey:
    """What a first pass over the manifest found."""

    images: int
    invalid: list[InvalidRow]
    extra: list[str]  # names of the columns we do not know, in the order they came
    kept: RowKeeper | None  # all rows, if the job folder does not hold them all


def survey(job: Job) -> Survey:
    """Read the whole manifest once, so that its faults show before anything heavy starts."""
    found = Survey(0, [], [], RowKeeper() if job.rows_to_keep else None)
    names: dict[str, None] = {}
    for row in job.read_own_rows():
        if found.kept is not None:
            found.kept.add(row)
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
    *, retry_failed: bool = False,
) -> Summary:  # fmt: skip
    """Make every image of the job (or the first `limit`) that is not finished. `open_pool` gets the number to make.

    `retry_failed`: images that failed or were quarantined are not finished.
    """
    started = time.monotonic()
    surveyed = survey(job)
    new_folders = missing_folders(job.folder)
    with lock(job.state / "lock") as held:
        check_still_same_job(job)
        is_new = not (job.folder / JOB_FILE).exists()
        run = Run(job, surveyed, held, progress, should_stop)
        try:
            summary = run.make(open_pool, limit, retry_failed)
        except UsageError:
            if is_new and not read_finished(job).images:
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

    def make(self, open_pool: PoolFactory, limit: int | None, retry_failed: bool) -> Summary:
        job, surveyed = self.job, self.surveyed
        total = min(surveyed.images, limit) if limit else surveyed.images
        sweep(job)
        job.stop_file.unlink(missing_ok=True)
        schema = results_schema(read_extra_fields(job.manifest, surveyed.extra))
        writer = ResultsWriter(job.folder, schema, surveyed.images + len(surveyed.invalid), self.held.check)
        done = read_finished(job)
        if retry_failed:
            self.forget_failed(done)
        finished = {index for index in done.images if 1 <= index <= total}
        summary = Summary(total, len(finished), len(surveyed.invalid), failed_before=len(done.failed & finished))
        save_job(job, surveyed.images, len(surveyed.invalid), surveyed.kept)
        write_invalid_rows(job, surveyed.invalid, done.invalid_rows, writer)
        try:
            self.reuse(summary, finished, writer)
            self.progress.started(total, len(finished), surveyed.invalid)
            if summary.left and not self.should_stop():
                self.draw(open_pool, summary, finished, writer)
        finally:
            if self.held.is_ours():
                sweep(job)  # a killed worker cannot clean up
                job.stop_file.unlink(missing_ok=True)
                writer.seal()
                if retry_failed or done.doubled:
                    writer.drop_superseded()
                self.progress.durable()
        self.held.check()
        summary.stopped = bool(summary.left)
        return summary

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
        batches = takewhile(lambda batch: batch.images[0].index <= summary.total, todo(self.job, finished))
        with open_pool(summary.left) as pool:
            work = within(batches, summary.total)
            Dispatch(self.job, pool, writer, self.progress, summary, work).run(self.should_stop)


def sweep(job: Job) -> None:
    paths = ResultsPaths(job.folder)
    sweep_temporaries(job.folder, job.scratch, paths.journal, paths.parts_folder)


def read_unchanged_rows(job: Job) -> Iterator[Row | InvalidRow]:
    """The manifest's rows again, hours later perhaps; raise ManifestError when the file is not what it was."""
    for number, row in enumerate(job.read_rows()):
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
    doubled: bool = False  # images were tried again, and their older rows are still there


def read_finished(job: Job) -> Finished:
    """Of an image's rows the newest counts, which is read last."""
    finished = Finished()
    for row in ResultsPaths(job.folder).read_rows(["index", "row", "status"]):
        if row["index"] is None:
            finished.invalid_rows.add(row["row"])
        else:
            finished.doubled = finished.doubled or row["index"] in finished.images
            finished.images.add(row["index"])
            (finished.failed.discard if row["status"] == Status.OK else finished.failed.add)(row["index"])
    return finished


def write_invalid_rows(job: Job, invalid: list[InvalidRow], written: set[int], writer: ResultsWriter) -> None:
    for row in invalid:
        if row.number not in written:
            writer.append(invalid_row(row, job.run_columns()))
            writer.flush_if_due()


class Dispatch:
    """The loop between the pool and the results: one chunk in flight per worker, cut to the worker's speed."""

    def __init__(
        self, job: Job, pool: Pool, writer: ResultsWriter, progress: Progress, summary: Summary,
        batches: Iterator[MicroBatch],
    ) -> None:  # fmt: skip
        self.job = job
        self.pool = pool
        self.writer = writer
        self.progress = progress
        self.summary = summary
        self.batches = batches
        self.retries: deque[MicroBatch] = deque()
        self.suspects: deque[MicroBatch] = deque()  # tried last, so that good work shows which is to blame
        self.fresh_deaths: dict[str, int] = {}
        self.in_flight: dict[str, deque[MicroBatch]] = {}
        self.deaths: dict[int, int] = {}  # index -> workers lost while making it
        self.speeds: dict[str, Speed] = {}

    def run(self, should_stop: Callable[[], bool]) -> None:
        while self.summary.left and not should_stop():
            for worker in self.pool.idle():
                self.submit(worker)
            if not self.in_flight and self.pool.idle():
                raise ManifestError(f"{self.job.manifest}: {CHANGED}")
            self.handle(self.pool.events(POLL_S))
        if self.summary.left:
            self.drain()

    def drain(self) -> None:
        """Have each busy worker finish and deliver the micro-batch it is at, and leave the rest."""
        with storage_errors(self.job.stop_file):
            self.job.stop_file.touch()
        deadline = time.monotonic() + GRACE_S
        while self.in_flight and time.monotonic() < deadline:
            self.handle(self.pool.events(POLL_S))

    def submit(self, worker: str) -> None:
        chunk = self.cut_chunk(worker)
        if chunk:
            self.in_flight[worker] = deque(chunk)
            self.speeds.setdefault(worker, Speed()).started()
            self.pool.submit(worker, chunk)

    def cut_chunk(self, worker: str) -> list[MicroBatch]:
        """Micro-batches for some 15 seconds of this worker's time, fewer when the end is near."""
        fair = max(1, self.summary.left // (2 * self.pool.size))
        images = min(self.speeds.get(worker, Speed()).images_in(CHUNK_TARGET_S), fair)
        chunk: list[MicroBatch] = []
        while sum(len(batch.images) for batch in chunk) < images:
            batch = self.retries.popleft() if self.retries else next(self.batches, None)
            if batch is None:
                break
            chunk.append(batch)
        if not chunk and self.suspects:
            chunk.append(self.suspects.popleft())  # a suspect travels alone
        return chunk

    def handle(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case BatchDone(worker, results):
                    self.finish_batch(worker, results)
                case ChunkDone(worker):
                    self.in_flight.pop(worker, None)
                case WorkerReady():
                    self.progress.worker(event)
                case WorkerLost(worker, reason):
                    self.progress.worker(event)
                    self.recover(worker, reason)
        if self.writer.flush_if_due():
            self.progress.durable()

    def finish_batch(self, worker: str, results: list[ImageResult]) -> None:
        batch = self.in_flight[worker].popleft()
        self.fresh_deaths[worker] = 0
        self.speeds[worker].finished(len(batch.images))
        requests = {image.index: image for image in batch.images}
        for result in results:
            result.attempts += self.deaths.get(result.index, 0)
            self.record(requests[result.index], result)

    def record(self, request: ImageRequest, result: ImageResult) -> None:
        self.writer.append(image_row(request, result, self.job.run_columns()))
        self.summary.counts[result.status] += 1
        self.progress.image(request, result)

    def recover(self, worker: str, reason: str) -> None:
        """Bring a lost worker's micro-batches back. The one it was at is tried again image by image."""
        left = self.in_flight.pop(worker, deque())
        if not left:
            return
        suspects = split_to_singles([left.popleft()])
        self.retries.extendleft(reversed(left))
        if not any(self.deaths.get(suspect.images[0].index) for suspect in suspects):
            self.fresh_deaths[worker] = self.fresh_deaths.get(worker, 0) + 1
        if self.fresh_deaths.get(worker, 0) >= MAX_FRESH_DEATHS:
            self.pool.retire(worker)
        for suspect in suspects:
            self.accuse(suspect, worker, reason)

    def accuse(self, suspect: MicroBatch, worker: str, reason: str) -> None:
        """Count a lost worker against an image. Where no image has come out yet, the worker is the likelier culprit."""
        request = suspect.images[0]
        deaths = self.deaths[request.index] = self.deaths.get(request.index, 0) + 1
        if deaths >= MAX_DEATHS and self.summary.counts[Status.OK]:
            self.record(request, quarantined(request, deaths, reason))
            return
        if deaths >= MAX_DEATHS:
            self.pool.retire(worker)
        self.suspects.append(suspect)


def quarantined(request: ImageRequest, deaths: int, reason: str) -> ImageResult:
    now = time.time()
    return ImageResult(
        request.index, Status.QUARANTINED, error_class="worker_died", attempts=deaths, started_at=now, finished_at=now,
        error_message=f"{deaths} workers died while making this image; the last one: {reason}",
    )  # fmt: skip


class Speed:
    """A worker's seconds per image, measured, newer ones counting more."""

    def __init__(self) -> None:
        self.seconds_per_image: float | None = None
        self.since = time.monotonic()

    def started(self) -> None:
        self.since = time.monotonic()

    def finished(self, images: int) -> None:
        now = time.monotonic()
        latest = (now - self.since) / images
        self.since = now
        self.seconds_per_image = (
            latest if self.seconds_per_image is None else 0.7 * self.seconds_per_image + 0.3 * latest
        )

    def images_in(self, seconds: float) -> int:
        """How many images the worker makes in so much time; one while its speed is unknown."""
        return 1 if self.seconds_per_image is None else max(1, int(seconds / max(self.seconds_per_image, 1e-3)))
