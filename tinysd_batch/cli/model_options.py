"""Arguments and options shared by the commands that read a checkpoint: convert, quantize and inspect."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions

SourceArgument = Annotated[
    Path, typer.Argument(help="An SD v1 checkpoint (.safetensors, .ckpt, .pt) or a float folder in diffusers' layout.")
]
OutputArgument = Annotated[Path, typer.Argument(help="The model folder to write; must not exist.")]
AllowPickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Also read pickle files (.ckpt, .pt, .bin): only tensors, never code."),
]
EmaOption = Annotated[bool, typer.Option("--ema", help="Use the averaged (EMA) weights of the UNet (model_ema).")]
VaeOption = Annotated[
    Path | None,
    typer.Option("--vae", help="Read the VAE from this file or folder instead.", show_default=False),
]


def make_source_options(allow_pickle: bool, ema: bool, vae: Path | None) -> "SourceOptions":
    from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions

    return SourceOptions(allow_pickle=allow_pickle, ema=ema, vae=vae)


def print_to_stderr(line: str) -> None:
    """Print a status line to stderr."""
    typer.echo(line, err=True)
