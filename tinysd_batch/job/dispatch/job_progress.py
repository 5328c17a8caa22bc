"""What a run reports while it goes on, and its summary at the end."""

from dataclasses import dataclass, field
from typing import Protocol

from tinysd_batch.job.workers.pool import WorkerLost, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, InvalidRow, Status

MAX_INVALID_ROWS_IN_MEMORY = 1000


@dataclass(slots=True)
class InvalidRows:
    """The number of invalid manifest rows, and the first ones themselves: there may be millions."""

    first: list[InvalidRow] = field(default_factory=list)
    count: int = 0

    def add(self, row: InvalidRow) -> None:
        self.count += 1
        if len(self.first) < MAX_INVALID_ROWS_IN_MEMORY:
            self.first.append(row)

    @property
    def are_all_in_memory(self) -> bool:
        return self.count == len(self.first)


class JobProgress(Protocol):
    """Receives reports while a job runs."""

    def report_start(self, total: int, finished: int, invalid: InvalidRows) -> None: ...
    def report_worker(self, event: WorkerReady | WorkerLost) -> None: ...
    def report_image(self, request: ImageRequest, result: ImageResult) -> None: ...
    def note(self, line: str) -> None:
        """Report something about the whole run."""
        ...

    def report_flush(self) -> None:
        """Report that the results of all images reported so far are on disk."""
        ...


@dataclass(slots=True)
class RunSummary:
    """The result of a run."""

    total: int  # images in the job, or up to --limit
    finished_before: int
    invalid_rows: int
    counts: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))  # images of this run
    failed_before: int = 0
    beyond_limit: int = 0  # images of the job that --limit excludes from this run
    reused: int = 0  # images of `finished_before` that this run took from another job
    stopped: bool = False
    seconds: float = 0.0

    @property
    def left(self) -> int:
        return self.total - self.finished_before - sum(self.counts.values())

    @property
    def failed(self) -> int:
        return self.failed_before + self.counts[Status.FAILED] + self.counts[Status.QUARANTINED]
