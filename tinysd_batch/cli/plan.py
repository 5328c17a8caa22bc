"""`tinysd-batch plan`: what submit would do."""

from typing import Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.submit import ManifestArgument, OutputOption, choose_manifest, prepare_from_options, submit
from tinysd_batch.errors import StorageError


@options.add_options_of(submit)
def plan(
    manifest: ManifestArgument = None,
    from_file: options.FromFileOption = None,
    output: OutputOption = None,
    reuse: options.ReuseOption = None,
    preset: options.PresetOption = None,
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
    chosen = choose_manifest(manifest, from_file, others["more_words"])
    with ReadingProgress(make_console(stderr=True, quiet=as_json), f"Reading {chosen}") as progress:
        job, _ = prepare_from_options(chosen, output, preset or [], flags, reuse)
        printer = PlanPrinter(make_console(quiet=as_json), verbose, progress)
        planned = make_plan(job, printer.row, others["limit"], retry_failed=others["retry_failed"], progress=progress)
    printer.plan(job, planned)
    if as_json:
        typer.echo(json.dumps(plan_as_dict(planned)))
    if not planned.fits_disk:
        raise typer.Exit(StorageError.exit_code)
    if planned.invalid_rows:
        raise typer.Exit(3)
