"""`tinysd-batch convert`: turn a checkpoint into a float model folder."""

from typing import Annotated

import typer

from tinysd_batch.cli.model_options import (
    AllowPickleOption,
    EmaOption,
    OutputArgument,
    SourceArgument,
    VaeOption,
    make_source_options,
    print_to_stderr,
)
from tinysd_batch.cli.terminal.signals import exit_on_sigterm
from tinysd_batch.errors import UsageError


def convert_command(
    source: SourceArgument,
    out: OutputArgument,
    allow_pickle: AllowPickleOption = False,
    ema: EmaOption = False,
    vae: VaeOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Store weights as fp16 or fp32; unchanged if not given.", show_default=False),
    ] = None,
) -> None:
    """Convert an SD v1 checkpoint to a float model folder, unchanged in quality and size."""
    if dtype not in (None, "fp16", "fp32"):
        raise UsageError(f"--dtype {dtype}: fp16 or fp32 was expected")
    from tinysd_batch.quantize.convert import convert_model

    with exit_on_sigterm():
        convert_model(source, out, make_source_options(allow_pickle, ema, vae), dtype, print_to_stderr)
    typer.echo(f"{out}: ready for `tinysd-batch submit MANIFEST --model {out}`")
