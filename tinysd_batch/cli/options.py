"""The options that set something, each under the origin's name and today's; commands that draw take them all."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class SettingOption:
    """An option for the field of `config.Settings` that it is named after."""

    value_type: type
    flags: tuple[str, ...]
    help: str


SETTING_OPTIONS = {
    "model": SettingOption(
        str, ("--model", "--ckpt"), "A model folder; `embedded` is the small one that ships with us, and the default."
    ),
    "seed": SettingOption(int, ("--seed",), "The first image's seed; random if not given, printed and kept."),
    "negative_prompt": SettingOption(str, ("--negative-prompt",), "What the pictures should not show."),
    "prompt_syntax": SettingOption(
        str, ("--prompt-syntax",), "Marks in prompts: seed (cat:0.25 dog:0.75; default), a1111 ((cat:1.2)) or none."
    ),
    "long_prompts": SettingOption(
        bool, ("--long-prompts",), "Encode prompts beyond the model's token limit in pieces, instead of cutting them."
    ),
    "height": SettingOption(int, ("--height", "--H"), "Pixels; the model's own size if not given."),
    "width": SettingOption(int, ("--width", "--W"), "Pixels; the model's own size if not given."),
    "steps": SettingOption(
        int,
        ("--steps", "--ddim_steps", "--num-inference-steps"),
        "Sampling steps, 1 to 1000; the model's own number if not given.",
    ),
    "scale": SettingOption(
        float,
        ("--scale", "--guidance-scale", "--cfg-scale"),
        "Guidance scale; 1 switches guidance off; the model's own if not given.",
    ),
    "sampler": SettingOption(
        str,
        ("--sampler",),
        "plms (default), ddim, euler, euler_a, heun, dpm2, dpm2_a, lms, dpmpp_2m or unipc.",
    ),
    "eta": SettingOption(float, ("--eta", "--ddim_eta"), "Fresh noise in ddim and plms, 0 (default) to 1."),
    "n_iter": SettingOption(int, ("--n_iter", "--n-iter", "--batch-count"), "Batches for each prompt (default 1)."),
    "n_samples": SettingOption(int, ("--n_samples", "--n-samples", "--batch-size"), "Images in a batch (default 1)."),
    "max_batch": SettingOption(
        int, ("--max-batch",), "Let up to so many images of neighbouring rows share a batch (default: a row alone)."
    ),
    "fixed_code": SettingOption(bool, ("--fixed_code", "--fixed-code"), "Start all images from the same noise."),
    "rng": SettingOption(str, ("--rng",), "cpu (default), or cuda: the noise that a CUDA card draws from a seed."),
    "precision": SettingOption(str, ("--precision",), "full (float32), autocast (float16 on GPUs) or auto (default)."),
    "device": SettingOption(str, ("--device",), "cpu, cuda or auto (default)."),
    "vram_budget": SettingOption(
        str,
        ("--vram-budget",),
        "Device memory for everything, such as 900MB, 0.5 (a share) or -500MB (all but so much).",
    ),
    "turbo": SettingOption(bool, ("--turbo",), "Keep the UNet's weights unpacked while drawing: faster, more memory."),
    "unet_bs": SettingOption(
        int, ("--unet_bs", "--unet-bs"), "Rows through the UNet at once, two an image with guidance (default: all)."
    ),
    "format": SettingOption(str, ("--format",), "png (default), jpg or webp."),
    "quality": SettingOption(int, ("--quality",), "Of jpg and webp, 1 to 100 (default 90)."),
    "no_metadata": SettingOption(bool, ("--no-metadata",), "Write no prompt, seed or settings into the pictures."),
    "interpret_lines": SettingOption(
        bool,
        ("--interpret-lines",),
        "In a .txt, skip lines that begin with # and read options behind a prompt (-n4 -S7, --steps 20).",
    ),
    "skip_save": SettingOption(bool, ("--skip_save", "--skip-save"), "Draw, but write no pictures: to measure speed."),
    "skip_grid": SettingOption(
        bool, ("--skip_grid", "--skip-grid"), "Write no grid, or contact sheet, of the pictures."
    ),
    "n_rows": SettingOption(int, ("--n_rows", "--n-rows"), "Rows of the grid (default: as it fits best)."),
    "C": SettingOption(int, ("--C",), "Latent channels: checked against the model, which decides."),
    "f": SettingOption(int, ("--f",), "Pixels per latent: checked against the model, which decides."),
}

StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse a manifest with columns that are not known.")]
PresetOption = Annotated[
    list[Path] | None,
    typer.Option("--preset", help="A TOML file of settings to start from; may be repeated.", show_default=False),
]
ExtraWordsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Nothing more is taken; who types a prompt is told how.", hidden=True, metavar=""),
]
FromFileOption = Annotated[
    Path | None,
    typer.Option(
        "--from-file", "--from_file", help="A file with a prompt a line, or any manifest.", show_default=False
    ),
]
ReuseOption = Annotated[
    Path | None,
    typer.Option(
        "--reuse",
        help="A job folder: the new job takes over its pictures where they would come out the same, and its seeds.",
        show_default=False,
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="A line for each image, with its seed and path.")]


def add_options_of(other: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command every option of another that it does not have, so that the same command line suits both.

    It gets their values as the dictionary `others`; an option that is added to `other` is accepted from then on.
    """

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.name != "others"]
        names = {each.name for each in own}
        added = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for each in inspect.signature(other).parameters.values()
            if each.name not in names
        ]

        @functools.wraps(command)
        def with_others(**values: Any) -> Any:
            others = {each.name: values.pop(each.name) for each in added}
            return command(**values, others=others)

        with_others.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        with_others.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
        return with_others

    return with_options


def add_setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each setting. It gets them as a dictionary, None for what was not said."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "settings"]
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                setting.value_type | None, typer.Option(*setting.flags, help=setting.help, show_default=False)
            ],
        )
        for name, setting in SETTING_OPTIONS.items()
    ]

    @functools.wraps(command)
    def with_settings(**values: Any) -> Any:
        settings = {name: values.pop(name) for name in SETTING_OPTIONS}
        return command(**values, settings=settings)

    with_settings.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    with_settings.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
    return with_settings
