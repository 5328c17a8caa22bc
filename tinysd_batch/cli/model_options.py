"""Options that commands which read a checkpoint share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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


def options(allow_pickle: bool, ema: bool, vae: Path | None) -> "Options":
    from tinysd_batch.quantize.sources.checkpoint_source import Options

    return Options(allow_pickle=allow_pickle, ema=ema, vae=vae)


def tell(line: str) -> None:
    """Say on stderr what is being done."""
    typer.echo(line, err=True)
