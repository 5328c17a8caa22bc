"""Show the package's log records on standard error: warnings always, INFO with --verbose."""

import contextlib
import logging
import sys
from collections.abc import Iterator


class StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a progress bar replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)  # noqa: T201


@contextlib.contextmanager
def show_log_records(verbose: bool) -> Iterator[None]:
    """Show records of the package while the block runs."""
    handler = StderrHandler(logging.INFO if verbose else logging.WARNING)
    logger = logging.getLogger("tinysd_batch")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
