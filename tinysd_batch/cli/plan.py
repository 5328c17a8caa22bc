"""`tinysd-batch plan`: what submit would do."""

from typing import Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.submit import Manifest, Output, one_manifest, prepare, submit
from tinysd_batch.errors import StorageError


@options.takes_options_of(submit)
def plan(
    manifest: Manifest = None,
    from_file: options.FromFile = None,
    output: Output = None,
    reuse: options.Reuse = None,
    preset: options.Preset = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each row of the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    *,
    others: dict[str, Any],
) -> None:
    """Check a manifest without generating: rows, faults, memory, time, disk. Writes nothing, takes submit's options.

    For a GPU that is not here: --device cuda --vram-budget 4GB.
    """
    import json

    from tinysd_batch.config import Settings
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.plan.job_plan import make_plan, plan_as_dict
    from tinysd_batch.report.plan.plan_text import PlanPrinter
    from tinysd_batch.report.reading_progress import ReadingProgress

    flags = {name: value for name, value in others.items() if name in Settings.model_fields}
    flags["strict"] = others["strict"] or None
    chosen = one_manifest(manifest, from_file, others["more_words"])
    with ReadingProgress(make_console(stderr=True, quiet=as_json), f"Reading {chosen}") as progress:
        job, _ = prepare(chosen, output, preset or [], flags, reuse)
        printer = PlanPrinter(make_console(quiet=as_json), verbose, progress)
        planned = make_plan(job, printer.row, others["limit"], retry_failed=others["retry_failed"], progress=progress)
    printer.plan(job, planned)
    if as_json:
        typer.echo(json.dumps(plan_as_dict(planned)))
    if not planned.fits_disk:
        raise typer.Exit(StorageError.exit_code)
    if planned.invalid_rows:
        raise typer.Exit(3)
