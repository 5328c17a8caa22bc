"""`tinysd-batch plan`: show what submit would do."""

from typing import Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.submit import (
    ManifestArgument,
    OutputOption,
    choose_manifest,
    prepare_from_options,
    submit_command,
)
from tinysd_batch.errors import StorageError


@options.add_options_of(submit_command)
def plan_command(
    manifest: ManifestArgument = None,
    from_file: options.FromFileOption = None,
    output: OutputOption = None,
    reuse: options.ReuseOption = None,
    preset: options.PresetOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for each manifest row.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    *,
    inherited_options: dict[str, Any],
) -> None:
    """Check a manifest without generating: rows, errors, memory, time, disk. Writes nothing; takes submit's options.

    To plan for a GPU of another machine: --device cuda --vram-budget 4GB.
    """
    import json

    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.plan.job_plan import make_plan, plan_as_dict
    from tinysd_batch.report.plan.plan_text import PlanPrinter
    from tinysd_batch.report.reading_progress import ReadingProgress
    from tinysd_batch.settings.schema import SETTINGS

    settings = {name: value for name, value in inherited_options.items() if name in SETTINGS}
    manifest_path = choose_manifest(manifest, from_file, inherited_options["extra_words"])
    with ReadingProgress(make_console(stderr=True, quiet=as_json), f"Reading {manifest_path}") as progress:
        job, _ = prepare_from_options(manifest_path, output, preset or [], settings, reuse)
        printer = PlanPrinter(make_console(quiet=as_json), verbose, progress)
        job_plan = make_plan(
            job,
            printer.print_row,
            inherited_options["limit"],
            retry_failed=inherited_options["retry_failed"],
            progress=progress,
        )
    printer.print_plan(job, job_plan)
    if as_json:
        typer.echo(json.dumps(plan_as_dict(job_plan)))
    if not job_plan.fits_disk:
        raise typer.Exit(StorageError.exit_code)
    if job_plan.invalid_rows:
        raise typer.Exit(3)
