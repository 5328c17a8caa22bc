"""The loop between the pool and the results: chunks to idle workers, and what becomes of every image written down."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tinysd_batch.errors import NoWorkerError, StorageError
from tinysd_batch.job.dispatch.chunk_size import HangTimeout, WorkerLoad, WorkerSpeed, choose_chunk_cost
from tinysd_batch.job.dispatch.job_progress import JobProgress, RunSummary
from tinysd_batch.job.dispatch.quarantine import LossTracker
from tinysd_batch.job.dispatch.queue import BatchQueue
from tinysd_batch.job.plan.batches import make_probe_request, split_into_single_images
from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.job.results.rows import make_image_row
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.precision_record import update_precision_record
from tinysd_batch.job.workers.adopt import adopt_image
from tinysd_batch.job.workers.faults import FAULT_POLICIES, FaultAction, FaultType
from tinysd_batch.job.workers.oom_fallback import ImageShape, get_image_shape
from tinysd_batch.job.workers.pool import BatchDone, ChunkDone, WorkerEvent, WorkerLost, WorkerPool, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status
from tinysd_batch.storage.atomic import storage_errors

STOP_GRACE_S = 30.0  # how long a stop waits for the micro-batches in flight
POLL_TIMEOUT_S = 0.5
EQUAL_FAILURES_BEFORE_TRIAL = 8  # failures of one class before anything was made: is it the images, or everything?
DRIVER_PAUSE_S = (
    30.0  # a loop that took longer was stopped itself (SIGSTOP, a sleeping laptop), and no worker hangs for it
)
ROWS_EXHAUSTED = "the job's rows ended before its last image: its folder was changed while the job ran; submit again"


@dataclass(slots=True)
class RunningChunk:
    """What a worker is at."""

    batches: deque[MicroBatch]  # the first is the one being made
    batch_started_at: float  # when that was begun

    @property
    def images(self) -> int:
        return sum(len(batch.wanted) for batch in self.batches)


class Dispatcher:
    """One chunk in flight per worker, cut to its speed. What a failure leads to is in `failures.POLICY`."""

    def __init__(
        self, job: Job, pool: WorkerPool, writer: ResultsWriter, progress: JobProgress, summary: RunSummary,
        batches: Iterator[MicroBatch], patience: HangTimeout | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.job = job
        self.pool = pool
        self.writer = writer
        self.progress = progress
        self.summary = summary
        self.queue = BatchQueue(batches)
        self.hang_timeout = patience or HangTimeout()
        self.clock = clock
        self.last_checked_at = clock()
        self.running_chunks: dict[str, RunningChunk] = {}
        self.speeds: dict[str, WorkerSpeed] = {}
        self.losses = LossTracker()
        self.last_loss_by_image: dict[int, WorkerLost] = {}  # by image
        self.shapes_too_large: dict[str, set[ImageShape]] = {}  # what a worker cannot hold, however it saves
        self.trial_image: ImageRequest | None = None  # one that was made in this run, the quickest
        self.withheld_failures: list[tuple[ImageRequest, ImageResult]] = []  # failures before anything was made
        self.is_withholding_failures = (
            True  # nothing has been made yet: failures may be of the model or the installation
        )

    def run(self, should_stop: Callable[[], bool]) -> None:
        while self.summary.left and not should_stop():
            self.assign_chunks()
            self.flush_if_due()  # while the workers are at work
            self.handle_events(self.pool.wait_for_events(POLL_TIMEOUT_S))
            self.kill_hung_workers()
        if self.summary.left:
            self.drain()

    def drain(self) -> None:
        """Have each busy worker finish and deliver the micro-batch it is at, and leave the rest."""
        with self.writer.guard(), storage_errors(self.job.stop_file):
            self.job.stop_file.touch()
        deadline = self.clock() + STOP_GRACE_S
        while self.running_chunks and self.clock() < deadline:
            self.handle_events(self.pool.wait_for_events(POLL_TIMEOUT_S))
            self.flush_if_due()

    def flush_if_due(self) -> None:
        if self.writer.flush_if_due():
            self.progress.report_flush()

    # Handing out

    def assign_chunks(self) -> None:
        idle = self.pool.idle_workers()
        for worker in idle:
            self.submit(worker, self.next_chunk(worker))
        for worker in idle:
            if not self.running_chunks:  # those left out as too slow are better than none
                self.submit(worker, self.next_chunk(worker, anything=True))
        if self.running_chunks or not self.summary.left or not idle:
            return
        if self.withheld_failures and not self.queue.waiting:
            self.release_withheld_failures()
        elif len(idle) == len(self.pool.workers()):  # nobody is still to come
            raise StorageError(f"{self.job.folder}: {ROWS_EXHAUSTED}")

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        if chunk:
            self.running_chunks[worker] = RunningChunk(deque(chunk), self.clock())
            self.pool.submit(worker, chunk)

    def next_chunk(self, worker: str, anything: bool = False) -> list[MicroBatch]:
        """Micro-batches for some seconds of this worker's time; a suspect or a trial travels alone."""
        if self.losses.needs_trial(worker, next_is_suspect=False):
            return [self.make_trial_batch()]
        if len(self.withheld_failures) >= EQUAL_FAILURES_BEFORE_TRIAL:
            return [self.make_trial_batch(neutral=True)] if not self.running_chunks else []
        first = self.queue.pop_fitting(lambda batch: self.can_fit(worker, batch))
        if first is not None:
            return self.build_chunk(worker, first, anything)
        suspect = self.next_suspect()
        if suspect is not None and self.losses.needs_trial(worker, next_is_suspect=True):
            self.queue.suspects.appendleft(suspect)
            return [self.make_trial_batch()]
        return [] if suspect is None else [suspect]

    def next_suspect(self) -> MicroBatch | None:
        """One that is still to be tried; those that are guilty by now are written down."""
        while self.queue.suspects:
            suspect = self.queue.suspects.popleft()
            if not self.is_condemned(suspect.images[0]):
                return suspect
        return None

    def build_chunk(self, worker: str, first: MicroBatch, anything: bool) -> list[MicroBatch]:
        """A chunk that begins with this batch; empty, and the batch given back, where the worker is left out."""
        unit = estimate_batch_cost(first)
        flying = sum(flight.images for flight in self.running_chunks.values())
        left = unit / len(first.wanted) * (self.summary.left - flying - len(self.withheld_failures))
        others = [self.get_worker_load(other) for other in self.running_chunks]
        others += [
            self.get_worker_load(other)
            for other in self.pool.idle_workers()
            if other not in self.running_chunks and other != worker
        ]
        work = choose_chunk_cost(replace(self.get_worker_load(worker), busy_s=0.0), others, left, unit)
        if not work and not anything:
            self.queue.put_back([first])
            return []
        chunk, taken = [first], unit
        while taken < 0.999 * work and (batch := self.queue.pop_fitting(lambda batch: self.can_fit(worker, batch))):
            chunk.append(batch)
            taken += estimate_batch_cost(batch)
        return chunk

    def get_worker_load(self, worker: str) -> WorkerLoad:
        """Its speed, and how long it is busy yet; one that is late is taken to need as long again."""
        speed = self.speeds[worker].cost_per_s if worker in self.speeds else None
        flight = self.running_chunks.get(worker)
        if flight is None:
            return WorkerLoad(speed)
        elapsed = self.clock() - flight.batch_started_at
        expected = sum(map(estimate_batch_cost, flight.batches)) / speed if speed else 2 * elapsed
        return WorkerLoad(speed, abs(expected - elapsed))

    def can_fit(self, worker: str, batch: MicroBatch) -> bool:
        """Whether the worker can hold it, for all we know, or nobody can."""
        shape = get_image_shape(batch.images[0])
        return shape not in self.shapes_too_large.get(worker, ()) or not self.workers_that_may_fit(shape)

    def workers_that_may_fit(self, shape: ImageShape) -> list[str]:
        return [worker for worker in self.pool.workers() if shape not in self.shapes_too_large.get(worker, ())]

    def make_trial_batch(self, neutral: bool = False) -> MicroBatch:
        """An image to draw and throw away: one that was made before, or one that nobody could object to."""
        image = make_probe_request(self.job.settings) if neutral or self.trial_image is None else self.trial_image
        return MicroBatch((image,), frozenset())

    # Hearing back

    def handle_events(self, events: list[WorkerEvent]) -> None:
        self.note_shared_losses([event for event in events if isinstance(event, WorkerLost) and event.shared_cause])
        for event in events:
            match event:
                case BatchDone(worker, results, seconds):
                    self.handle_batch_done(worker, results, seconds)
                case ChunkDone(worker):
                    if flight := self.running_chunks.pop(worker, None):
                        self.queue.put_back(flight.batches)  # none, unless it was told to stop
                case WorkerReady():
                    self.handle_worker_ready(event)
                case WorkerLost():
                    self.progress.report_worker(event)
                    self.handle_worker_lost(event)

    def handle_worker_ready(self, event: WorkerReady) -> None:
        """Keep a new worker's precision, or have the worker start again with that of the others of its machine."""
        self.progress.report_worker(event)
        if self.job.settings.precision != "auto" or "precision_key" not in event.description:
            return
        with self.writer.guard():
            conflict = update_precision_record(self.job.precision_file, event.description)
        if conflict is not None:
            self.handle_events([self.pool.kill(event.worker, conflict, FaultType.WORKER_DIED)])

    def note_shared_losses(self, lost: list[WorkerLost]) -> None:
        """One line for each cause that ended several workers."""
        for cause in dict.fromkeys(event.shared_cause for event in lost):
            workers = [event.worker for event in lost if event.shared_cause == cause]
            images = sum(self.running_chunks[worker].images for worker in workers if worker in self.running_chunks)
            plural = "s go" if images > 1 else " goes"
            self.progress.note(f"{cause}; its {images:,} image{plural} to others" if images else str(cause))

    def handle_batch_done(self, worker: str, results: list[ImageResult], seconds: float | None) -> None:
        flight, now = self.running_chunks.get(worker), self.clock()
        if flight is None or not flight.batches or not are_results_of(flight.batches[0], results):
            return  # delivered twice, or by a worker that was given up: its pictures are adopted
        batch = flight.batches.popleft()
        took = now - flight.batch_started_at if seconds is None else seconds
        self.speeds.setdefault(worker, WorkerSpeed()).add_measurement(estimate_batch_cost(batch), took)
        flight.batch_started_at = now
        self.losses.record_batch_done(worker)
        if not batch.wanted:
            self.evaluate_trial(results)
            return
        self.handle_results(worker, batch, results)

    def handle_results(self, worker: str, batch: MicroBatch, results: list[ImageResult]) -> None:
        requests = {image.index: image for image in batch.images}
        for result in results:
            result.attempts += self.losses.lost_attempts[result.index]
            self.handle_result(worker, requests[result.index], result)

    def handle_result(self, worker: str, request: ImageRequest, result: ImageResult) -> None:
        """Write down what became of an image, unless another worker or more knowledge may change it."""
        shape = get_image_shape(request)
        if result.status is Status.OK:
            self.release_withheld_failures()
            if self.trial_image is None or request.params.steps < self.trial_image.params.steps:
                self.trial_image = request
        elif result.error_class == FaultType.OUT_OF_MEMORY:
            self.shapes_too_large.setdefault(worker, set()).add(shape)
            if self.workers_that_may_fit(shape):
                self.queue.put_back([MicroBatch((request,), frozenset({request.index}))])
                return
        if result.status is Status.FAILED and self.is_withholding_failures:
            self.withhold_failure(request, result)
        else:
            self.write_result(request, result)

    def withhold_failure(self, request: ImageRequest, result: ImageResult) -> None:
        """Before anything was made a failure is not believed, unless others differ from it."""
        self.withheld_failures.append((request, result))
        if result.error_class != self.withheld_failures[0][1].error_class:
            self.release_withheld_failures()

    def evaluate_trial(self, results: list[ImageResult]) -> None:
        """After many failures alike: if a plain picture fails alike too, no image is at fault. Raises NoWorkerError."""
        (trial,) = results
        if len(self.withheld_failures) < EQUAL_FAILURES_BEFORE_TRIAL:
            return
        first = self.withheld_failures[0][1]
        if trial.status is Status.FAILED and trial.error_class == first.error_class:
            raise NoWorkerError(
                f"the first {len(self.withheld_failures)} images all failed alike, and so did a plain one: {first.error_class}: "
                f"{first.error_message}; nothing was written of them, and once this is mended the same command goes on"
            )
        self.release_withheld_failures()

    def release_withheld_failures(self) -> None:
        """Failures are those of their images from now on, and so are the ones held back."""
        self.is_withholding_failures = False
        for request, result in self.withheld_failures:
            self.write_result(request, result)
        self.withheld_failures.clear()

    def write_result(self, request: ImageRequest, result: ImageResult) -> None:
        self.writer.append(make_image_row(request, result, self.job.run_columns()))
        self.summary.counts[result.status] += 1
        self.progress.report_image(request, result)

    # Losses

    def kill_hung_workers(self) -> None:
        now = self.clock()
        paused, self.last_checked_at = now - self.last_checked_at, now
        for worker, flight in list(self.running_chunks.items()):
            if paused > DRIVER_PAUSE_S:
                flight.batch_started_at = min(now, flight.batch_started_at + paused)
            speed = self.speeds[worker].cost_per_s if worker in self.speeds else None
            work = estimate_batch_cost(flight.batches[0]) if flight.batches else 0.0
            allowed = self.hang_timeout.compute_s(work, speed)
            if now - flight.batch_started_at > allowed:
                self.handle_events([self.pool.kill(worker, f"no answer for {allowed:,.0f} s", FaultType.HUNG)])

    def handle_worker_lost(self, event: WorkerLost) -> None:
        """Bring a lost worker's micro-batches back. The one it was at is tried again, as its loss demands."""
        flight = self.running_chunks.pop(event.worker, None)
        if flight is None:
            return
        self.adopt_unreported_images(event.worker, flight)
        if not flight.batches:
            return
        batch = flight.batches.popleft()
        self.queue.put_back(flight.batches)
        if not batch.wanted:
            self.handle_lost_trial(event)
        elif FAULT_POLICIES[event.fault].action is FaultAction.SUSPECT or not self.losses.nobody_is_charged(
            batch.wanted
        ):
            self.requeue_as_suspects(batch, event)
        else:
            self.queue.put_back([batch])

    def adopt_unreported_images(self, worker: str, flight: RunningChunk) -> None:
        """Take over what a lost worker had finished and not told of, so that the batch it was at is the first."""
        while flight.batches and flight.batches[0].wanted:
            batch = flight.batches[0]
            found = [adopt_image(self.job.folder, image) for image in batch.images if image.index in batch.wanted]
            results = [result for result in found if result is not None]
            if len(results) < len(found):
                return
            flight.batches.popleft()
            self.losses.record_batch_done(worker)
            self.handle_results(worker, batch, results)

    def handle_lost_trial(self, event: WorkerLost) -> None:
        if event.is_permanent or FAULT_POLICIES[event.fault].action is not FaultAction.SUSPECT:
            return
        if self.losses.trial_lost(event.worker):
            reason = f"lost on good images too, the last time: {event.reason}"
            self.pool.retire(event.worker, reason)
            self.progress.report_worker(replace(event, reason=reason, is_permanent=True))

    def requeue_as_suspects(self, batch: MicroBatch, event: WorkerLost) -> None:
        """Count a lost worker against the images it was at, and try them one by one."""
        self.losses.record_worker_loss(event.worker, batch.wanted)
        for single in split_into_single_images([batch]):
            self.last_loss_by_image[single.images[0].index] = event
            if not self.is_condemned(single.images[0]):
                self.queue.suspects.append(single)

    def is_condemned(self, request: ImageRequest) -> bool:
        """Whether the image killed often enough; then it is written down, as quarantined or as drawn before a death."""
        if not self.losses.should_quarantine(request.index):
            return False
        tries, event = self.losses.lost_attempts[request.index], self.last_loss_by_image[request.index]
        self.write_result(
            request, adopt_image(self.job.folder, request) or make_quarantine_result(request, tries, event)
        )
        return True


def are_results_of(batch: MicroBatch, results: list[ImageResult]) -> bool:
    """Whether these are the results of the batch: of all images wanted, or of a trial."""
    return {result.index for result in results} == (batch.wanted or {batch.images[0].index})


def make_quarantine_result(request: ImageRequest, tries: int, event: WorkerLost) -> ImageResult:
    now = time.time()
    return ImageResult(
        request.index, Status.QUARANTINED, error_class=str(event.fault), attempts=tries,
        started_at=now, finished_at=now,
        error_message=f"{tries} workers were lost while making this image; the last one: {event.reason}",
    )  # fmt: skip
