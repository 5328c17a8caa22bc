"""Options that several commands share, each under the origin's name and today's."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--ckpt",
        help="A model folder; `embedded` is the small one that ships with us, and the default.",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", help="The first image's seed; random if not given, and kept in the job.", show_default=False
    ),
]
NegativePrompt = Annotated[
    str | None, typer.Option("--negative-prompt", help="What the pictures should not show.", show_default=False)
]
Height = Annotated[
    int | None, typer.Option("--height", "--H", help="Pixels; the model's own size if not given.", show_default=False)
]
Width = Annotated[
    int | None, typer.Option("--width", "--W", help="Pixels; the model's own size if not given.", show_default=False)
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", "--ddim_steps", help="Sampling steps; the model's own number if not given.", show_default=False
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--scale",
        "--guidance-scale",
        help="Guidance scale; 1 switches guidance off; the model's own if not given.",
        show_default=False,
    ),
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="plms (default), ddim or euler.", show_default=False)]
Eta = Annotated[
    float | None, typer.Option("--eta", "--ddim_eta", help="Fresh noise in ddim, 0 (default) to 1.", show_default=False)
]
NIter = Annotated[int | None, typer.Option("--n_iter", help="Batches for each row (default 1).", show_default=False)]
NSamples = Annotated[int | None, typer.Option("--n_samples", help="Images in a batch (default 1).", show_default=False)]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", help="full (float32), autocast (float16 on GPUs) or auto (default).", show_default=False
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or auto (default).", show_default=False)]
VramBudget = Annotated[
    str | None,
    typer.Option(
        "--vram-budget",
        help="Device memory for weights, such as 900MB; below what they take, the model's parts take turns.",
        show_default=False,
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse a manifest with columns that are not known.")]
Preset = Annotated[
    list[Path] | None,
    typer.Option("--preset", help="A TOML file of settings to start from; may be repeated.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line for each image, with its seed and path.")]
