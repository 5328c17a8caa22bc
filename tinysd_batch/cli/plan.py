"""`tinysd-batch plan`: what submit would do."""

from typing import Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.submit import Manifest, Output, one_manifest, prepare
from tinysd_batch.errors import StorageError


@options.takes_settings
def plan(
    manifest: Manifest = None,
    from_file: options.FromFile = None,
    output: Output = None,
    reuse: options.Reuse = None,
    preset: options.Preset = None,
    strict: options.Strict = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each row of the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Check a manifest without drawing: rows, images, faults, weights, tokens, disk, memory. Writes nothing."""
    import json

    from rich.console import Console

    from tinysd_batch.report.plan import PlanPrinter, make_plan, plan_as_dict

    flags = {**settings, "strict": strict or None}
    job, _ = prepare(one_manifest(manifest, from_file), output, preset or [], flags, reuse)
    printer = PlanPrinter(Console(highlight=False, quiet=as_json), verbose)
    planned = make_plan(job, printer.row)
    printer.plan(job, planned)
    if as_json:
        typer.echo(json.dumps(plan_as_dict(planned)))
    if not planned.fits_disk:
        raise typer.Exit(StorageError.exit_code)
    if planned.invalid_rows:
        raise typer.Exit(3)
