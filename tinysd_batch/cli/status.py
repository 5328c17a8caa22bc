"""`tinysd-batch status`: show how far a job is, or the settings of an image."""

from pathlib import Path
from typing import Annotated

import typer

from tinysd_batch.errors import UsageError


def status_command(
    job: Annotated[Path | None, typer.Argument(help="The job folder that submit printed.", show_default=False)] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="Show the settings that are stored in this image.", show_default=False),
    ] = None,
) -> None:
    """Show how far a job is, what failed and why. Works while the job runs and afterwards."""
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.status import print_image_settings, print_status, read_status

    console = make_console()
    if job is None and image is None:
        raise UsageError("name a job folder, or an image with --image")
    if image is not None:
        print_image_settings(image, console)
    if job is not None:
        print_status(job, read_status(job), console)
