"""`tinysd-batch status`: what has become of a job, or what made a picture."""

from pathlib import Path
from typing import Annotated

import typer

from tinysd_batch.errors import UsageError


def status(
    job: Annotated[Path | None, typer.Argument(help="The job folder that submit printed.", show_default=False)] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="A picture: say what made it, as it is written inside.", show_default=False),
    ] = None,
) -> None:
    """Say how far a job is, what failed and why; works while it runs and after."""
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.status import print_image, print_status, read_status

    console = make_console()
    if job is None and image is None:
        raise UsageError("name a job folder, or a picture with --image")
    if image is not None:
        print_image(image, console)
    if job is not None:
        print_status(job, read_status(job), console)
