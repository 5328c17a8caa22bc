"""`tinysd-batch quantize`: a model of the user's own at 2 bits."""

from typing import Annotated

import typer

from tinysd_batch.cli.convert import AllowPickle, Ema, Out, Source, Vae, options, tell
from tinysd_batch.cli.signals import end_on_sigterm
from tinysd_batch.errors import UsageError

LATER = ("calib", "distill")


def quantize(
    source: Source,
    out: Out,
    level: Annotated[str, typer.Option("--level", help="fast: without data. Others are to come.")] = "fast",
    allow_pickle: AllowPickle = False,
    ema: Ema = False,
    vae: Vae = None,
) -> None:
    """Make a model folder of an SD v1 checkpoint with its UNet at 2 bits."""
    if level in LATER:
        raise UsageError(f"--level {level}: not there yet; only fast is")
    if level != "fast":
        raise UsageError(f"--level {level}: fast was expected")
    from tinysd_batch.quantize.fast import quantize_model

    with end_on_sigterm():
        quantize_model(source, out, options(allow_pickle, ema, vae), tell)
    typer.echo(f"{out}: ready for `tinysd-batch submit MANIFEST --model {out}`")
