"""Write what a run reports to the job's log, besides showing it."""

import logging

from tinysd_batch.job.dispatch.job_progress import InvalidRows, JobProgress
from tinysd_batch.job.workers.pool import WorkerLost, WorkerReady
from tinysd_batch.records import ImageRequest, ImageResult, Status
from tinysd_batch.text import make_text_storable

logger = logging.getLogger(__name__)


class LoggedProgress:
    """Passes every report on, and logs it at DEBUG level: the terminal shows the same from `progress`."""

    def __init__(self, progress: JobProgress) -> None:
        self.progress = progress

    def report_start(self, total: int, finished: int, invalid: InvalidRows) -> None:
        logger.debug("%d images, %d of them finished; %d invalid rows", total, finished, invalid.count)
        self.progress.report_start(total, finished, invalid)

    def report_worker(self, event: WorkerReady | WorkerLost) -> None:
        logger.debug("%s", event)
        self.progress.report_worker(event)

    def report_image(self, request: ImageRequest, result: ImageResult) -> None:
        if result.status is not Status.OK:
            message = make_text_storable(result.error_message or "")
            logger.debug("row %d, image %d: %s: %s", request.row, request.index, result.status, message)
        elif result.degraded:
            logger.debug("row %d, image %d: degraded: %s", request.row, request.index, ", ".join(result.degraded))
        self.progress.report_image(request, result)

    def note(self, line: str) -> None:
        logger.debug("%s", make_text_storable(line))
        self.progress.note(line)

    def report_flush(self) -> None:
        self.progress.report_flush()
