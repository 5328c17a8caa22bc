"""Command-line options for settings, shared by all commands that generate images.

Each option has its tiny-stable-diffusion name (`--ddim_steps`) and a current one (`--steps`).
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class SettingOption:
    """The option for one field of `config.Settings`; its key in SETTING_OPTIONS is the field's name."""

    value_type: type
    flags: tuple[str, ...]
    help: str


SETTING_OPTIONS = {
    "model": SettingOption(
        str, ("--model", "--ckpt"), "Model folder; `embedded` (default) is the small model shipped with tinysd-batch."
    ),
    "seed": SettingOption(int, ("--seed",), "Seed of the first image; random (printed and stored) if not given."),
    "negative_prompt": SettingOption(str, ("--negative-prompt",), "What the images should not show."),
    "prompt_syntax": SettingOption(
        str, ("--prompt-syntax",), "Prompt weights: seed (cat:0.25 dog:0.75; default), a1111 ((cat:1.2)) or none."
    ),
    "long_prompts": SettingOption(
        bool,
        ("--long-prompts",),
        "Encode prompts beyond the model's token limit in chunks instead of truncating them.",
    ),
    "height": SettingOption(int, ("--height", "--H"), "In pixels; the model's native size if not given."),
    "width": SettingOption(int, ("--width", "--W"), "In pixels; the model's native size if not given."),
    "steps": SettingOption(
        int,
        ("--steps", "--ddim_steps", "--num-inference-steps"),
        "Sampling steps, 1 to 1000; the model's default if not given.",
    ),
    "scale": SettingOption(
        float,
        ("--scale", "--guidance-scale", "--cfg-scale"),
        "Guidance scale; 1 disables guidance; the model's default if not given.",
    ),
    "sampler": SettingOption(
        str,
        ("--sampler",),
        "plms (default), ddim, euler, euler_a, heun, dpm2, dpm2_a, lms, dpmpp_2m or unipc.",
    ),
    "eta": SettingOption(float, ("--eta", "--ddim_eta"), "Noise added per step in ddim and plms, 0 (default) to 1."),
    "n_iter": SettingOption(int, ("--n_iter", "--n-iter", "--batch-count"), "Batches per prompt (default 1)."),
    "n_samples": SettingOption(int, ("--n_samples", "--n-samples", "--batch-size"), "Images per batch (default 1)."),
    "max_batch": SettingOption(
        int, ("--max-batch",), "Combine up to this many images of neighbouring rows in a batch (default: no combining)."
    ),
    "fixed_code": SettingOption(bool, ("--fixed_code", "--fixed-code"), "Start all images from the same noise."),
    "rng": SettingOption(str, ("--rng",), "cpu (default), or cuda: the noise of a CUDA GPU for a seed."),
    "precision": SettingOption(str, ("--precision",), "full (float32), autocast (float16 on GPUs) or auto (default)."),
    "device": SettingOption(str, ("--device",), "cpu, cuda or auto (default)."),
    "vram_budget": SettingOption(
        str,
        ("--vram-budget",),
        "Limit of device memory: 900MB, 0.5 (a fraction) or -500MB (all but 500 MB).",
    ),
    "turbo": SettingOption(bool, ("--turbo",), "Keep the UNet's weights dequantized: faster, but needs more memory."),
    "unet_bs": SettingOption(
        int, ("--unet_bs", "--unet-bs"), "Rows per UNet call; an image with guidance has two (default: all rows)."
    ),
    "format": SettingOption(str, ("--format",), "png (default), jpg or webp."),
    "quality": SettingOption(int, ("--quality",), "Quality of jpg and webp, 1 to 100 (default 90)."),
    "no_metadata": SettingOption(bool, ("--no-metadata",), "Do not store prompt, seed and settings in the images."),
    "interpret_lines": SettingOption(
        bool,
        ("--interpret-lines",),
        "In a .txt, skip lines that begin with # and read options after a prompt (-n4 -S7, --steps 20).",
    ),
    "skip_save": SettingOption(bool, ("--skip_save", "--skip-save"), "Generate without writing images (a speed test)."),
    "skip_grid": SettingOption(
        bool, ("--skip_grid", "--skip-grid"), "Do not write a grid (contact sheet) of the images."
    ),
    "n_rows": SettingOption(int, ("--n_rows", "--n-rows"), "Rows of the grid (default: chosen automatically)."),
    "C": SettingOption(int, ("--C",), "Latent channels; must be the model's own number."),
    "f": SettingOption(int, ("--f",), "Pixels per latent; must be the model's own number."),
}

StrictOption = Annotated[bool, typer.Option("--strict", help="Reject manifests with unknown columns.")]
PresetOption = Annotated[
    list[Path] | None,
    typer.Option("--preset", help="A TOML file with default settings; may be repeated.", show_default=False),
]
ExtraWordsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Not used: the words of a prompt get a hint to txt2img.", hidden=True, metavar=""),
]
FromFileOption = Annotated[
    Path | None,
    typer.Option(
        "--from-file", "--from_file", help="A file with one prompt per line, or any manifest.", show_default=False
    ),
]
ReuseOption = Annotated[
    Path | None,
    typer.Option(
        "--reuse",
        help="An earlier job folder: reuse its images where they would be identical, and its seeds.",
        show_default=False,
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print seed and path of each image, and the log.")]


def add_options_of(source: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add every option of the command `source` that the decorated command lacks, so that both accept the same line.

    The decorated command gets the values of the added options as the dictionary `inherited_options`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(command).parameters.values()
        own = [parameter for parameter in parameters if parameter.name != "inherited_options"]
        own_names = {parameter.name for parameter in own}
        added = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(source).parameters.values()
            if parameter.name not in own_names
        ]

        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            inherited_options = {parameter.name: values.pop(parameter.name) for parameter in added}
            return command(**values, inherited_options=inherited_options)

        return with_parameters(wrapper, [*own, *added])

    return decorate


def add_setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for each setting. The command gets them as the dictionary `settings`; None means not given."""
    parameters = inspect.signature(command).parameters.values()
    own = [parameter for parameter in parameters if parameter.name != "settings"]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                option.value_type | None, typer.Option(*option.flags, help=option.help, show_default=False)
            ],
        )
        for name, option in SETTING_OPTIONS.items()
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        settings = {name: values.pop(name) for name in SETTING_OPTIONS}
        return command(**values, settings=settings)

    return with_parameters(wrapper, [*own, *added])


def with_parameters(command: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Set the signature that typer reads."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
