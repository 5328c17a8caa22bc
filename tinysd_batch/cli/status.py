"""`tinysd-batch status`: what has become of a job."""

from pathlib import Path
from typing import Annotated

import typer


def status(job: Annotated[Path, typer.Argument(help="The job folder that submit printed.")]) -> None:
    """Say how far a job is, what failed and why; works while it runs and after."""
    from rich.console import Console

    from tinysd_batch.report.status import print_status, read_status

    print_status(job, read_status(job), Console(highlight=False))
