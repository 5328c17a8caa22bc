"""Assign chunks to idle workers, and write down the result of every image."""

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
from tinysd_batch.job.workers.adopt_images import adopt_image
from tinysd_batch.job.workers.faults import FAULT_POLICIES, FaultAction, FaultType
from tinysd_batch.job.workers.oom_fallback import ImageShape, get_image_shape
from tinysd_batch.job.workers.pool import BatchDone, ChunkDone, WorkerEvent, WorkerLost, WorkerPool, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status
from tinysd_batch.storage.filesystem import storage_errors

STOP_GRACE_S = 30.0  # how long a stop waits for the micro-batches that are being generated
POLL_TIMEOUT_S = 0.5
EQUAL_FAILURES_BEFORE_TRIAL = 8  # before any success: do these images fail, or does everything?
# A loop iteration that took longer means that the driver itself was stopped (SIGSTOP, a sleeping laptop).
DRIVER_PAUSE_S = 30.0
ROWS_EXHAUSTED = "the job's rows ended before its last image: its folder was changed while the job ran; submit again"


@dataclass(slots=True)
class RunningChunk:
    """The micro-batches that a worker has been assigned and has not finished."""

    batches: deque[MicroBatch]  # the worker is generating the first
    batch_started_at: float  # when the worker started the first

    @property
    def image_count(self) -> int:
        return sum(len(batch.wanted) for batch in self.batches)


class Dispatcher:
    """Keeps one chunk running on each worker, sized to its speed, and handles failures as `FAULT_POLICIES` says."""

    def __init__(
        self,
        job: Job,
        pool: WorkerPool,
        writer: ResultsWriter,
        progress: JobProgress,
        summary: RunSummary,
        batches: Iterator[MicroBatch],
        hang_timeout: HangTimeout | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = job
        self.pool = pool
        self.writer = writer
        self.progress = progress
        self.summary = summary
        self.queue = BatchQueue(batches)
        self.hang_timeout = hang_timeout or HangTimeout()
        self.clock = clock
        self.last_checked_at = clock()
        self.running_chunks: dict[str, RunningChunk] = {}  # by worker
        self.speeds: dict[str, WorkerSpeed] = {}  # by worker
        self.losses = LossTracker()
        self.last_loss_by_image: dict[int, WorkerLost] = {}
        self.shapes_too_large: dict[str, set[ImageShape]] = {}  # by worker: shapes that no OOM fallback made fit
        self.trial_image: ImageRequest | None = None  # the image with the fewest steps that this run has generated
        # Until one image has been generated, a failure may be due to the model or the installation.
        self.is_withholding_failures = True
        self.withheld_failures: list[tuple[ImageRequest, ImageResult]] = []

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Dispatch until all images have a result, or until `should_stop` returns True."""
        while self.summary.left and not should_stop():
            self.assign_chunks()
            self.flush_if_due()  # while the workers are busy
            self.handle_events(self.pool.wait_for_events(POLL_TIMEOUT_S))
            self.kill_hung_workers()
        if self.summary.left:
            self.drain()

    def drain(self) -> None:
        """Let each busy worker finish and deliver its current micro-batch. The rest of its chunk is left."""
        with self.writer.guard(), storage_errors(self.job.stop_file):
            self.job.stop_file.touch()
        deadline = self.clock() + STOP_GRACE_S
        while self.running_chunks and self.clock() < deadline:
            self.handle_events(self.pool.wait_for_events(POLL_TIMEOUT_S))
            self.flush_if_due()

    def flush_if_due(self) -> None:
        if self.writer.flush_if_due():
            self.progress.report_flush()

    # Assigning chunks

    def assign_chunks(self) -> None:
        """Give a chunk to every idle worker. Raises StorageError where images are left and no rows for them."""
        idle = self.pool.idle_workers()
        for worker in idle:
            self.submit_chunk(worker, self.next_chunk(worker))
        for worker in idle:
            if not self.running_chunks:  # a worker that is too slow to help is better than none
                self.submit_chunk(worker, self.next_chunk(worker, even_if_slow=True))
        if self.running_chunks or not self.summary.left or not idle:
            return
        if self.withheld_failures and not self.queue.waiting:
            self.release_withheld_failures()
        elif len(idle) == len(self.pool.workers()):  # no other worker is still starting
            raise StorageError(f"{self.job.folder}: {ROWS_EXHAUSTED}")

    def submit_chunk(self, worker: str, chunk: list[MicroBatch]) -> None:
        if chunk:
            self.running_chunks[worker] = RunningChunk(deque(chunk), self.clock())
            self.pool.submit(worker, chunk)

    def next_chunk(self, worker: str, even_if_slow: bool = False) -> list[MicroBatch]:
        """Return the next micro-batches for this worker. A suspect image or a trial is a chunk of its own."""
        if self.losses.needs_trial(worker, next_is_suspect=False):
            return [self.make_trial_batch()]
        if len(self.withheld_failures) >= EQUAL_FAILURES_BEFORE_TRIAL:
            return [self.make_trial_batch(use_probe=True)] if not self.running_chunks else []
        first = self.queue.pop_fitting(lambda batch: self.can_fit(worker, batch))
        if first is not None:
            return self.build_chunk(worker, first, even_if_slow)
        suspect = self.pop_suspect()
        if suspect is not None and self.losses.needs_trial(worker, next_is_suspect=True):
            self.queue.suspects.appendleft(suspect)
            return [self.make_trial_batch()]
        return [] if suspect is None else [suspect]

    def pop_suspect(self) -> MicroBatch | None:
        """Remove and return the next suspect to try. Quarantine those that no longer need a try."""
        while self.queue.suspects:
            suspect = self.queue.suspects.popleft()
            if not self.losses.should_quarantine(suspect.images[0].index):
                return suspect
            self.quarantine(suspect.images[0])
        return None

    def build_chunk(self, worker: str, first: MicroBatch, even_if_slow: bool) -> list[MicroBatch]:
        """Return a chunk that begins with `first`, or put `first` back and return none if the worker is too slow."""
        unit = estimate_batch_cost(first)
        running = sum(chunk.image_count for chunk in self.running_chunks.values())
        remaining = unit / len(first.wanted) * (self.summary.left - running - len(self.withheld_failures))
        others = [self.get_worker_load(other) for other in self.running_chunks]
        others += [
            self.get_worker_load(other)
            for other in self.pool.idle_workers()
            if other not in self.running_chunks and other != worker
        ]
        target = choose_chunk_cost(replace(self.get_worker_load(worker), busy_s=0.0), others, remaining, unit)
        if not target and not even_if_slow:
            self.queue.put_back([first])
            return []
        chunk, cost = [first], unit
        while cost < 0.999 * target and (batch := self.queue.pop_fitting(lambda batch: self.can_fit(worker, batch))):
            chunk.append(batch)
            cost += estimate_batch_cost(batch)
        return chunk

    def get_worker_load(self, worker: str) -> WorkerLoad:
        """Return a worker's speed and remaining busy time. One that is overdue by t seconds is given t more."""
        speed = self.speeds[worker].cost_per_s if worker in self.speeds else None
        chunk = self.running_chunks.get(worker)
        if chunk is None:
            return WorkerLoad(speed)
        elapsed = self.clock() - chunk.batch_started_at
        expected = sum(map(estimate_batch_cost, chunk.batches)) / speed if speed else 2 * elapsed
        return WorkerLoad(speed, abs(expected - elapsed))

    def can_fit(self, worker: str, batch: MicroBatch) -> bool:
        """Whether the batch may fit the worker's memory. True as well if it is known to fit no worker."""
        shape = get_image_shape(batch.images[0])
        return shape not in self.shapes_too_large.get(worker, ()) or not self.workers_that_may_fit(shape)

    def workers_that_may_fit(self, shape: ImageShape) -> list[str]:
        return [worker for worker in self.pool.workers() if shape not in self.shapes_too_large.get(worker, ())]

    def make_trial_batch(self, use_probe: bool = False) -> MicroBatch:
        """Return a batch whose image is discarded: one generated before, or a plain probe image."""
        image = make_probe_request(self.job.settings) if use_probe or self.trial_image is None else self.trial_image
        return MicroBatch((image,), frozenset())

    # Handling events

    def handle_events(self, events: list[WorkerEvent]) -> None:
        self.note_shared_losses([event for event in events if isinstance(event, WorkerLost) and event.shared_cause])
        for event in events:
            match event:
                case BatchDone(worker, results, seconds):
                    self.handle_batch_done(worker, results, seconds)
                case ChunkDone(worker):
                    if chunk := self.running_chunks.pop(worker, None):
                        self.queue.put_back(chunk.batches)  # none, unless the worker was stopped
                case WorkerReady():
                    self.handle_worker_ready(event)
                case WorkerLost():
                    self.progress.report_worker(event)
                    self.handle_worker_lost(event)

    def handle_worker_ready(self, event: WorkerReady) -> None:
        """Record a new worker's precision. Restart the worker if another one on its machine recorded another."""
        self.progress.report_worker(event)
        if self.job.settings.precision != "auto" or "precision_key" not in event.description:
            return
        with self.writer.guard():
            conflict = update_precision_record(self.job.precision_file, event.description)
        if conflict is not None:
            self.handle_events([self.pool.kill(event.worker, conflict, FaultType.WORKER_DIED)])

    def note_shared_losses(self, losses: list[WorkerLost]) -> None:
        """Report one line for each cause that ended several workers."""
        for cause in dict.fromkeys(loss.shared_cause for loss in losses):
            workers = [loss.worker for loss in losses if loss.shared_cause == cause]
            images = sum(self.running_chunks[worker].image_count for worker in workers if worker in self.running_chunks)
            plural = "s go" if images > 1 else " goes"
            self.progress.note(f"{cause}; its {images:,} image{plural} to other workers" if images else str(cause))

    def handle_batch_done(self, worker: str, results: list[ImageResult], seconds: float | None) -> None:
        chunk, now = self.running_chunks.get(worker), self.clock()
        if chunk is None or not chunk.batches or not are_results_of(chunk.batches[0], results):
            return  # delivered twice, or by a worker that counts as lost: its images were or will be adopted
        batch = chunk.batches.popleft()
        duration_s = now - chunk.batch_started_at if seconds is None else seconds
        self.speeds.setdefault(worker, WorkerSpeed()).add_measurement(estimate_batch_cost(batch), duration_s)
        chunk.batch_started_at = now
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
        """Write an image's result, unless it failed and another worker is to try it or its cause is still open."""
        shape = get_image_shape(request)
        if result.status is Status.OK:
            self.release_withheld_failures()
            if self.trial_image is None or request.settings.steps < self.trial_image.settings.steps:
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
        """Keep a failure that came before any success. Two different error classes mean that images are at fault."""
        self.withheld_failures.append((request, result))
        if result.error_class != self.withheld_failures[0][1].error_class:
            self.release_withheld_failures()

    def evaluate_trial(self, results: list[ImageResult]) -> None:
        """Decide what many equal failures mean: if the probe image fails in the same way, no image is at fault.

        Raises:
            NoWorkerError: everything fails, which the job cannot continue with.
        """
        (trial,) = results
        count = len(self.withheld_failures)
        if count < EQUAL_FAILURES_BEFORE_TRIAL:
            return
        first = self.withheld_failures[0][1]
        if trial.status is Status.FAILED and trial.error_class == first.error_class:
            raise NoWorkerError(
                f"the first {count} images and a test image all failed with the same error: {first.error_class}: "
                f"{first.error_message}; no results were written for them; fix the cause and run the same command again"
            )
        self.release_withheld_failures()

    def release_withheld_failures(self) -> None:
        """Write the failures that were withheld, and withhold no more."""
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
        """Kill workers that take too long for a micro-batch. Time in which the driver stood still does not count."""
        now = self.clock()
        paused_s, self.last_checked_at = now - self.last_checked_at, now
        for worker, chunk in list(self.running_chunks.items()):
            if paused_s > DRIVER_PAUSE_S:
                chunk.batch_started_at = min(now, chunk.batch_started_at + paused_s)
            speed = self.speeds[worker].cost_per_s if worker in self.speeds else None
            cost = estimate_batch_cost(chunk.batches[0]) if chunk.batches else 0.0
            timeout_s = self.hang_timeout.compute_s(cost, speed)
            if now - chunk.batch_started_at > timeout_s:
                self.handle_events([self.pool.kill(worker, f"no answer for {timeout_s:,.0f} s", FaultType.HUNG)])

    def handle_worker_lost(self, event: WorkerLost) -> None:
        """Requeue a lost worker's micro-batches. The fault decides how its current one is tried again."""
        chunk = self.running_chunks.pop(event.worker, None)
        if chunk is None:
            return
        self.adopt_unreported_images(event.worker, chunk)
        if not chunk.batches:
            return
        batch = chunk.batches.popleft()
        self.queue.put_back(chunk.batches)
        if not batch.wanted:
            self.handle_lost_trial(event)
        elif FAULT_POLICIES[event.fault].action is FaultAction.SUSPECT:
            self.requeue_as_suspects(batch, event)
        else:
            self.losses.record_node_loss(batch.wanted)
            if self.losses.has_too_many_node_losses(batch.wanted):
                self.requeue_as_suspects(batch, event)
            else:
                self.queue.put_back([batch])

    def adopt_unreported_images(self, worker: str, chunk: RunningChunk) -> None:
        """Adopt the batches that a lost worker had finished and not reported: its current batch is the first left."""
        while chunk.batches and chunk.batches[0].wanted:
            batch = chunk.batches[0]
            adopted = [adopt_image(self.job.folder, image) for image in batch.images if image.index in batch.wanted]
            results = [result for result in adopted if result is not None]
            if len(results) < len(adopted):
                return
            chunk.batches.popleft()
            self.losses.record_batch_done(worker)
            self.handle_results(worker, batch, results)

    def handle_lost_trial(self, event: WorkerLost) -> None:
        """Count a lost trial against the worker. Retire the worker if it is broken."""
        if event.is_permanent or FAULT_POLICIES[event.fault].action is not FaultAction.SUSPECT:
            return
        self.losses.record_lost_trial(event.worker)
        if self.losses.is_broken(event.worker):
            reason = f"also lost while generating images known to be good; last time: {event.reason}"
            self.pool.retire(event.worker, reason)
            self.progress.report_worker(replace(event, reason=reason, is_permanent=True))

    def requeue_as_suspects(self, batch: MicroBatch, event: WorkerLost) -> None:
        """Count a lost worker against the images of its batch, and requeue these one by one."""
        self.losses.record_worker_loss(event.worker, batch.wanted)
        for single in split_into_single_images([batch]):
            image = single.images[0]
            self.last_loss_by_image[image.index] = event
            if self.losses.should_quarantine(image.index):
                self.quarantine(image)
            else:
                self.queue.suspects.append(single)

    def quarantine(self, request: ImageRequest) -> None:
        """Write the image as quarantined, or as generated if a lost worker had published its file."""
        attempts, event = self.losses.lost_attempts[request.index], self.last_loss_by_image[request.index]
        result = adopt_image(self.job.folder, request) or make_quarantine_result(request, attempts, event)
        self.write_result(request, result)


def are_results_of(batch: MicroBatch, results: list[ImageResult]) -> bool:
    """Whether these are the results of the batch: of all wanted images, or of the image of a trial."""
    return {result.index for result in results} == (batch.wanted or {batch.images[0].index})


def make_quarantine_result(request: ImageRequest, attempts: int, event: WorkerLost) -> ImageResult:
    now = time.time()
    return ImageResult(
        request.index,
        Status.QUARANTINED,
        error_class=str(event.fault),
        error_message=f"{attempts} workers were lost while generating this image; the last one: {event.reason}",
        attempts=attempts,
        started_at=now,
        finished_at=now,
    )
