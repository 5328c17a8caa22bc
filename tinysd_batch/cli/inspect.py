"""`tinysd-batch inspect`: what is in a model."""

from pathlib import Path
from typing import Annotated

import typer

from tinysd_batch.cli.model_options import AllowPickleOption


def inspect(
    path: Annotated[Path, typer.Argument(help="A model folder or a checkpoint file, or `embedded`.")],
    allow_pickle: AllowPickleOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what a model is and what it holds: parts, weights, bits and bytes, type, digest.

    Ends with exit code 2 where no command takes the model, and says why.
    """
    import json

    from tinysd_batch.errors import ModelError
    from tinysd_batch.model.checkpoint.info import embedded_model_path
    from tinysd_batch.quantize.evaluate.inspect import inspect_model
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.inspection_text import inspection_as_dict, print_inspection

    found = inspect_model(embedded_model_path() if str(path) == "embedded" else path, allow_pickle=allow_pickle)
    if as_json:
        typer.echo(json.dumps(inspection_as_dict(found)))
    else:
        print_inspection(found, make_console())
    if found.unusable_reason:
        raise ModelError(found.unusable_reason)
