"""The loop between the pool and the results: chunks to idle workers, and what becomes of every image written down."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tinysd_batch.errors import NoWorkerError, StorageError
from tinysd_batch.job.dispatch.chunk_size import Patience, Speed, Standing, work_for
from tinysd_batch.job.dispatch.job_progress import Progress, Summary
from tinysd_batch.job.dispatch.quarantine import Blame
from tinysd_batch.job.dispatch.queue import Backlog
from tinysd_batch.job.plan.batches import neutral_image, split_to_singles
from tinysd_batch.job.plan.cost import work_of
from tinysd_batch.job.results.rows import image_row
from tinysd_batch.job.results.writer import ResultsWriter
from tinysd_batch.job.state.job import Job
from tinysd_batch.job.state.precision_record import update_record
from tinysd_batch.job.workers.adopt import adopt
from tinysd_batch.job.workers.faults import POLICY, Action, Fault
from tinysd_batch.job.workers.oom_fallback import Shape, shape_of
from tinysd_batch.job.workers.pool import BatchDone, ChunkDone, Event, Pool, WorkerLost, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, MicroBatch, Status
from tinysd_batch.storage.atomic import storage_errors

GRACE_S = 30.0  # how long a stop waits for the micro-batches in flight
POLL_S = 0.5
ALIKE = 8  # failures of one class before anything was made: is it the images, or everything?
PAUSE_S = 30.0  # a loop that took longer was stopped itself (SIGSTOP, a sleeping laptop), and no worker hangs for it
ROWS_ENDED = "the job's rows ended before its last image: its folder was changed while the job ran; submit again"


@dataclass(slots=True)
class Flight:
    """What a worker is at."""

    batches: deque[MicroBatch]  # the first is the one being made
    since: float  # when that was begun

    @property
    def images(self) -> int:
        return sum(len(batch.wanted) for batch in self.batches)


class Dispatch:
    """One chunk in flight per worker, cut to its speed. What a failure leads to is in `failures.POLICY`."""

    def __init__(
        self, job: Job, pool: Pool, writer: ResultsWriter, progress: Progress, summary: Summary,
        batches: Iterator[MicroBatch], patience: Patience | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.job = job
        self.pool = pool
        self.writer = writer
        self.progress = progress
        self.summary = summary
        self.backlog = Backlog(batches)
        self.patience = patience or Patience()
        self.clock = clock
        self.looked_at = clock()
        self.flights: dict[str, Flight] = {}
        self.speeds: dict[str, Speed] = {}
        self.blame = Blame()
        self.last_losses: dict[int, WorkerLost] = {}  # by image
        self.too_large: dict[str, set[Shape]] = {}  # what a worker cannot hold, however it saves
        self.good: ImageRequest | None = None  # one that was made in this run, the quickest
        self.held: list[tuple[ImageRequest, ImageResult]] = []  # failures before anything was made
        self.doubt = True  # nothing has been made yet: failures may be of the model or the installation

    def run(self, should_stop: Callable[[], bool]) -> None:
        while self.summary.left and not should_stop():
            self.hand_out()
            self.flush_if_due()  # while the workers are at work
            self.handle(self.pool.events(POLL_S))
            self.end_hung_workers()
        if self.summary.left:
            self.drain()

    def drain(self) -> None:
        """Have each busy worker finish and deliver the micro-batch it is at, and leave the rest."""
        with self.writer.guard(), storage_errors(self.job.stop_file):
            self.job.stop_file.touch()
        deadline = self.clock() + GRACE_S
        while self.flights and self.clock() < deadline:
            self.handle(self.pool.events(POLL_S))
            self.flush_if_due()

    def flush_if_due(self) -> None:
        if self.writer.flush_if_due():
            self.progress.durable()

    # Handing out

    def hand_out(self) -> None:
        idle = self.pool.idle()
        for worker in idle:
            self.submit(worker, self.next_chunk(worker))
        for worker in idle:
            if not self.flights:  # those left out as too slow are better than none
                self.submit(worker, self.next_chunk(worker, anything=True))
        if self.flights or not self.summary.left or not idle:
            return
        if self.held and not self.backlog.waiting:
            self.believe()
        elif len(idle) == len(self.pool.workers()):  # nobody is still to come
            raise StorageError(f"{self.job.folder}: {ROWS_ENDED}")

    def submit(self, worker: str, chunk: list[MicroBatch]) -> None:
        if chunk:
            self.flights[worker] = Flight(deque(chunk), self.clock())
            self.pool.submit(worker, chunk)

    def next_chunk(self, worker: str, anything: bool = False) -> list[MicroBatch]:
        """Micro-batches for some seconds of this worker's time; a suspect or a trial travels alone."""
        if self.blame.needs_trial(worker, next_is_suspect=False):
            return [self.trial()]
        if len(self.held) >= ALIKE:
            return [self.trial(neutral=True)] if not self.flights else []
        first = self.backlog.take(lambda batch: self.fits(worker, batch))
        if first is not None:
            return self.fill(worker, first, anything)
        suspect = self.next_suspect()
        if suspect is not None and self.blame.needs_trial(worker, next_is_suspect=True):
            self.backlog.suspects.appendleft(suspect)
            return [self.trial()]
        return [] if suspect is None else [suspect]

    def next_suspect(self) -> MicroBatch | None:
        """One that is still to be tried; those that are guilty by now are written down."""
        while self.backlog.suspects:
            suspect = self.backlog.suspects.popleft()
            if not self.is_condemned(suspect.images[0]):
                return suspect
        return None

    def fill(self, worker: str, first: MicroBatch, anything: bool) -> list[MicroBatch]:
        """A chunk that begins with this batch; empty, and the batch given back, where the worker is left out."""
        unit = work_of(first)
        flying = sum(flight.images for flight in self.flights.values())
        left = unit / len(first.wanted) * (self.summary.left - flying - len(self.held))
        others = [self.standing(other) for other in self.flights]
        others += [self.standing(other) for other in self.pool.idle() if other not in self.flights and other != worker]
        work = work_for(replace(self.standing(worker), busy_s=0.0), others, left, unit)
        if not work and not anything:
            self.backlog.give_back([first])
            return []
        chunk, taken = [first], unit
        while taken < 0.999 * work and (batch := self.backlog.take(lambda batch: self.fits(worker, batch))):
            chunk.append(batch)
            taken += work_of(batch)
        return chunk

    def standing(self, worker: str) -> Standing:
        """Its speed, and how long it is busy yet; one that is late is taken to need as long again."""
        speed = self.speeds[worker].value if worker in self.speeds else None
        flight = self.flights.get(worker)
        if flight is None:
            return Standing(speed)
        elapsed = self.clock() - flight.since
        expected = sum(map(work_of, flight.batches)) / speed if speed else 2 * elapsed
        return Standing(speed, abs(expected - elapsed))

    def fits(self, worker: str, batch: MicroBatch) -> bool:
        """Whether the worker can hold it, for all we know, or nobody can."""
        shape = shape_of(batch.images[0])
        return shape not in self.too_large.get(worker, ()) or not self.others_for(shape)

    def others_for(self, shape: Shape) -> list[str]:
        return [worker for worker in self.pool.workers() if shape not in self.too_large.get(worker, ())]

    def trial(self, neutral: bool = False) -> MicroBatch:
        """An image to draw and throw away: one that was made before, or one that nobody could object to."""
        image = neutral_image(self.job.settings) if neutral or self.good is None else self.good
        return MicroBatch((image,), frozenset())

    # Hearing back

    def handle(self, events: list[Event]) -> None:
        self.announce([event for event in events if isinstance(event, WorkerLost) and event.cause])
        for event in events:
            match event:
                case BatchDone(worker, results, seconds):
                    self.finish_batch(worker, results, seconds)
                case ChunkDone(worker):
                    if flight := self.flights.pop(worker, None):
                        self.backlog.give_back(flight.batches)  # none, unless it was told to stop
                case WorkerReady():
                    self.welcome(event)
                case WorkerLost():
                    self.progress.worker(event)
                    self.recover(event)

    def welcome(self, event: WorkerReady) -> None:
        """Keep a new worker's precision, or have the worker start again with that of the others of its machine."""
        self.progress.worker(event)
        if self.job.settings.precision != "auto" or "precision_key" not in event.description:
            return
        with self.writer.guard():
            conflict = update_record(self.job.precision_file, event.description)
        if conflict is not None:
            self.handle([self.pool.kill(event.worker, conflict, Fault.WORKER_DIED)])

    def announce(self, lost: list[WorkerLost]) -> None:
        """One line for each cause that ended several workers."""
        for cause in dict.fromkeys(event.cause for event in lost):
            workers = [event.worker for event in lost if event.cause == cause]
            images = sum(self.flights[worker].images for worker in workers if worker in self.flights)
            plural = "s go" if images > 1 else " goes"
            self.progress.note(f"{cause}; its {images:,} image{plural} to others" if images else str(cause))

    def finish_batch(self, worker: str, results: list[ImageResult], seconds: float | None) -> None:
        flight, now = self.flights.get(worker), self.clock()
        if flight is None or not flight.batches or not answers(flight.batches[0], results):
            return  # delivered twice, or by a worker that was given up: its pictures are adopted
        batch = flight.batches.popleft()
        took = now - flight.since if seconds is None else seconds
        self.speeds.setdefault(worker, Speed()).measure(work_of(batch), took)
        flight.since = now
        self.blame.worker_drew(worker)
        if not batch.wanted:
            self.judge_trial(results)
            return
        self.receive_all(worker, batch, results)

    def receive_all(self, worker: str, batch: MicroBatch, results: list[ImageResult]) -> None:
        requests = {image.index: image for image in batch.images}
        for result in results:
            result.attempts += self.blame.tries[result.index]
            self.receive(worker, requests[result.index], result)

    def receive(self, worker: str, request: ImageRequest, result: ImageResult) -> None:
        """Write down what became of an image, unless another worker or more knowledge may change it."""
        shape = shape_of(request)
        if result.status is Status.OK:
            self.believe()
            if self.good is None or request.params.steps < self.good.params.steps:
                self.good = request
        elif result.error_class == Fault.OUT_OF_MEMORY:
            self.too_large.setdefault(worker, set()).add(shape)
            if self.others_for(shape):
                self.backlog.give_back([MicroBatch((request,), frozenset({request.index}))])
                return
        if result.status is Status.FAILED and self.doubt:
            self.hold(request, result)
        else:
            self.record(request, result)

    def hold(self, request: ImageRequest, result: ImageResult) -> None:
        """Before anything was made a failure is not believed, unless others differ from it."""
        self.held.append((request, result))
        if result.error_class != self.held[0][1].error_class:
            self.believe()

    def judge_trial(self, results: list[ImageResult]) -> None:
        """After many failures alike: if a plain picture fails alike too, no image is at fault. Raises NoWorkerError."""
        (trial,) = results
        if len(self.held) < ALIKE:
            return
        first = self.held[0][1]
        if trial.status is Status.FAILED and trial.error_class == first.error_class:
            raise NoWorkerError(
                f"the first {len(self.held)} images all failed alike, and so did a plain one: {first.error_class}: "
                f"{first.error_message}; nothing was written of them, and once this is mended the same command goes on"
            )
        self.believe()

    def believe(self) -> None:
        """Failures are those of their images from now on, and so are the ones held back."""
        self.doubt = False
        for request, result in self.held:
            self.record(request, result)
        self.held.clear()

    def record(self, request: ImageRequest, result: ImageResult) -> None:
        self.writer.append(image_row(request, result, self.job.run_columns()))
        self.summary.counts[result.status] += 1
        self.progress.image(request, result)

    # Losses

    def end_hung_workers(self) -> None:
        now = self.clock()
        paused, self.looked_at = now - self.looked_at, now
        for worker, flight in list(self.flights.items()):
            if paused > PAUSE_S:
                flight.since = min(now, flight.since + paused)
            speed = self.speeds[worker].value if worker in self.speeds else None
            work = work_of(flight.batches[0]) if flight.batches else 0.0
            allowed = self.patience.allows(work, speed)
            if now - flight.since > allowed:
                self.handle([self.pool.kill(worker, f"no answer for {allowed:,.0f} s", Fault.HUNG)])

    def recover(self, event: WorkerLost) -> None:
        """Bring a lost worker's micro-batches back. The one it was at is tried again, as its loss demands."""
        flight = self.flights.pop(event.worker, None)
        if flight is None:
            return
        self.adopt_untold(event.worker, flight)
        if not flight.batches:
            return
        batch = flight.batches.popleft()
        self.backlog.give_back(flight.batches)
        if not batch.wanted:
            self.lose_trial(event)
        elif POLICY[event.fault].action is Action.SUSPECT or not self.blame.nobody_is_charged(batch.wanted):
            self.suspect(batch, event)
        else:
            self.backlog.give_back([batch])

    def adopt_untold(self, worker: str, flight: Flight) -> None:
        """Take over what a lost worker had finished and not told of, so that the batch it was at is the first."""
        while flight.batches and flight.batches[0].wanted:
            batch = flight.batches[0]
            found = [adopt(self.job.folder, image) for image in batch.images if image.index in batch.wanted]
            results = [result for result in found if result is not None]
            if len(results) < len(found):
                return
            flight.batches.popleft()
            self.blame.worker_drew(worker)
            self.receive_all(worker, batch, results)

    def lose_trial(self, event: WorkerLost) -> None:
        if event.for_good or POLICY[event.fault].action is not Action.SUSPECT:
            return
        if self.blame.trial_lost(event.worker):
            reason = f"lost on good images too, the last time: {event.reason}"
            self.pool.retire(event.worker, reason)
            self.progress.worker(replace(event, reason=reason, for_good=True))

    def suspect(self, batch: MicroBatch, event: WorkerLost) -> None:
        """Count a lost worker against the images it was at, and try them one by one."""
        self.blame.worker_lost(event.worker, batch.wanted)
        for single in split_to_singles([batch]):
            self.last_losses[single.images[0].index] = event
            if not self.is_condemned(single.images[0]):
                self.backlog.suspects.append(single)

    def is_condemned(self, request: ImageRequest) -> bool:
        """Whether the image killed often enough; then it is written down, as quarantined or as drawn before a death."""
        if not self.blame.is_guilty(request.index):
            return False
        tries, event = self.blame.tries[request.index], self.last_losses[request.index]
        self.record(request, adopt(self.job.folder, request) or quarantined(request, tries, event))
        return True


def answers(batch: MicroBatch, results: list[ImageResult]) -> bool:
    """Whether these are the results of the batch: of all images wanted, or of a trial."""
    return {result.index for result in results} == (batch.wanted or {batch.images[0].index})


def quarantined(request: ImageRequest, tries: int, event: WorkerLost) -> ImageResult:
    now = time.time()
    return ImageResult(
        request.index, Status.QUARANTINED, error_class=str(event.fault), attempts=tries,
        started_at=now, finished_at=now,
        error_message=f"{tries} workers were lost while making this image; the last one: {event.reason}",
    )  # fmt: skip
