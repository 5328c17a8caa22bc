"""`tinysd-batch verify`: compare a job's images with its table."""

from pathlib import Path
from typing import Annotated

import typer

PROBLEMS_EXIT_CODE = 3


def verify_command(
    job: Annotated[Path, typer.Argument(help="The job folder that submit printed.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Read every image of a job and compare it with the results table. Writes nothing."""
    import json

    from rich.console import Console

    from tinysd_batch.job.verify import verify_job
    from tinysd_batch.report.verification_text import VerifyProgress, print_verification, verification_as_dict

    verification = verify_job(job, VerifyProgress(Console(highlight=False, stderr=True)).on_image)
    if as_json:
        typer.echo(json.dumps(verification_as_dict(verification)))
    else:
        print_verification(str(job), verification, Console(highlight=False))
    if not verification.is_intact:
        raise typer.Exit(PROBLEMS_EXIT_CODE)
