"""What a run tells while it goes, and what it came to."""

from dataclasses import dataclass, field
from typing import Protocol

from tinysd_batch.job.pool import WorkerLost, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status


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
