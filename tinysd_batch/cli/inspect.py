"""`tinysd-batch inspect`: show what a model contains."""

from pathlib import Path
from typing import Annotated

import typer

from tinysd_batch.cli.model_options import AllowPickleOption


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A model folder or a checkpoint file, or `embedded`.")],
    allow_pickle: AllowPickleOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what a model is and contains: components, weights, bits and bytes, type, digest.

    Exits with code 2 and prints the reason if no command can use the model.
    """
    import json

    from tinysd_batch.errors import ModelError
    from tinysd_batch.model.checkpoint.info import embedded_model_path
    from tinysd_batch.quantize.evaluate.inspect import inspect_model
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.inspection_text import inspection_as_dict, print_inspection

    inspection = inspect_model(embedded_model_path() if str(path) == "embedded" else path, allow_pickle=allow_pickle)
    if as_json:
        typer.echo(json.dumps(inspection_as_dict(inspection)))
    else:
        print_inspection(inspection, make_console())
    if inspection.unusable_reason:
        raise ModelError(inspection.unusable_reason)
