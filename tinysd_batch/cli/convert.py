"""`tinysd-batch convert`: a model of the user's own as a float folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinysd_batch.cli.signals import end_on_sigterm
from tinysd_batch.errors import UsageError

if TYPE_CHECKING:
    from tinysd_batch.quantize.sources.checkpoint_source import Options

Source = Annotated[
    Path, typer.Argument(help="An SD v1 checkpoint (.safetensors, .ckpt, .pt) or a float folder in diffusers' layout.")
]
Out = Annotated[Path, typer.Argument(help="The model folder to write; must not exist.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickles (.ckpt, .pt, .bin) too: only tensors, never code.")
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged copies of the UNet's weights (model_ema).")]
Vae = Annotated[
    Path | None,
    typer.Option("--vae", help="Take the autoencoder from this file or folder.", show_default=False),
]


def convert(
    source: Source,
    out: Out,
    allow_pickle: AllowPickle = False,
    ema: Ema = False,
    vae: Vae = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Store as fp16 or fp32; as it is if not given.", show_default=False),
    ] = None,
) -> None:
    """Make a float model folder of an SD v1 checkpoint: as good as the checkpoint, and as large."""
    if dtype not in (None, "fp16", "fp32"):
        raise UsageError(f"--dtype {dtype}: fp16 or fp32 was expected")
    from tinysd_batch.quantize.convert import convert_model

    with end_on_sigterm():
        convert_model(source, out, options(allow_pickle, ema, vae), dtype, tell)
    typer.echo(f"{out}: ready for `tinysd-batch submit MANIFEST --model {out}`")


def options(allow_pickle: bool, ema: bool, vae: Path | None) -> "Options":
    from tinysd_batch.quantize.sources.checkpoint_source import Options

    return Options(allow_pickle=allow_pickle, ema=ema, vae=vae)


def tell(line: str) -> None:
    """Say on stderr what is being done."""
    typer.echo(line, err=True)
