"""`tinysd-batch quantize`: a model of the user's own at few bits."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinysd_batch.cli.convert import AllowPickle, Ema, Out, Source, Vae, options, tell
from tinysd_batch.cli.signals import end_on_sigterm
from tinysd_batch.config import parse_bytes
from tinysd_batch.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tinysd_batch.quantize.presets import Size
    from tinysd_batch.quantize.recipe import Recipe
    from tinysd_batch.quantize.sources import Options

LEVELS = ("auto", "fast", "calib", "distill")


def quantize(
    source: Source,
    out: Out,
    level: Annotated[
        str,
        typer.Option(
            "--level",
            help="fast: without data. calib: with the model's own drawings. distill: and tuned. auto: calib where it "
            "should take an hour at most, else fast.",
        ),
    ] = "auto",
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="tiny: all layers at 2 bits. default: few at 4 and 8. quality: most sorts at 4.",
            show_default="default",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", help="Most bytes of the UNet's file, such as 280MB.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="TOML: what calib draws, how hard it tries. fast then measures, too.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where calib computes: cpu, cuda or auto.")] = "auto",
    no_noise_correction: Annotated[
        bool, typer.Option("--no-noise-correction", help="Have calib and distill measure none.")
    ] = False,
    allow_pickle: AllowPickle = False,
    ema: Ema = False,
    vae: Vae = None,
) -> None:
    """Make a model folder of an SD v1 checkpoint with its UNet at 2 bits, a few layers at more."""
    if level not in LEVELS:
        raise UsageError(f"--level {level}: one of {', '.join(LEVELS)} was expected")
    size = size_of(preset, target_size)
    how = options(allow_pickle, ema, vae)
    with end_on_sigterm():
        make_and_report(source, out, how, level, recipe, device, size, noise_correction=not no_noise_correction)
    typer.echo(f"{out}: ready for `tinysd-batch submit MANIFEST --model {out}`")


def size_of(preset: str | None, target: str | None) -> "Size":
    """What the two options ask for. Raises UsageError."""
    from tinysd_batch.quantize.presets import DEFAULT, PRESETS, Size

    if preset is not None and target is not None:
        raise UsageError("--preset and --target-size: each decides the file's size; give one of them")
    if preset not in (None, *PRESETS):
        raise UsageError(f"--preset {preset}: one of {', '.join(PRESETS)} was expected")
    return Size(preset or DEFAULT, parse_bytes(target, "--target-size"))


def make_and_report(
    source: Path, out: Path, how: "Options", level: str, file: Path | None, device: str, size: "Size", *,
    noise_correction: bool,
) -> None:  # fmt: skip
    """Quantize, measure what can be, and report. Level fast draws nothing unless a recipe is given."""
    from tinysd_batch.quantize.calib import quantize_calibrated
    from tinysd_batch.quantize.fast import quantize_model
    from tinysd_batch.quantize.folder import open_source
    from tinysd_batch.quantize.measure import measure
    from tinysd_batch.quantize.sensitivity import harms_of
    from tinysd_batch.quantize.summary import summarize
    from tinysd_batch.quantize.trajectories import HELD_OUT_SEEDS
    from tinysd_batch.report.quantization import write_report

    level, recipe, chosen = decide(source, out, how, level, file, device, size, noise_correction=noise_correction)
    if recipe is None or level == "fast":
        made = quantize_model(source, out, how, tell, size, recipe, chosen)
    else:
        made = quantize_calibrated(
            source, out, how, recipe, chosen, tell,
            size=size, tune=level == "distill", noise_correction=noise_correction,
        )  # fmt: skip
    errors, harms, started = None, None, time.monotonic()
    if recipe is not None and made.held_out is not None:
        tell(f"measuring on {len(recipe.held_out)} held-out prompts")
        errors = measure(out, made.held_out, recipe.seed + HELD_OUT_SEEDS, recipe.scale, chosen)
        tell(
            f"against the float model: noise prediction {errors.mean_noise_db:.1f} dB, "
            f"final latents {errors.final_db:.1f} dB, pictures {errors.psnr_db:.1f} dB"
        )
        tell("measuring what each sort of layer harms alone")
        harms = harms_of(open_source(source, how).unet(), out / "unet", made.held_out, recipe.scale, chosen)
    made = replace(made, seconds=made.seconds + time.monotonic() - started)
    summary = summarize(out, made, str(chosen), recipe)
    page = write_report(out, summary, errors, recipe.held_out if recipe else [], harms)
    tell(f"report: {page}")


def decide(
    source: Path, out: Path, how: "Options", level: str, file: Path | None, device: str, size: "Size", *,
    noise_correction: bool,
) -> "tuple[str, Recipe | None, torch.device]":  # fmt: skip
    """Level, recipe and device, with a word on the level where it was not asked for."""
    from tinysd_batch.model.devices import choose_device
    from tinysd_batch.quantize.level import choose_level
    from tinysd_batch.quantize.recipe import read_recipe

    recipe = None if level == "fast" and file is None else read_recipe(file)
    chosen = choose_device("cpu" if recipe is None else None if device == "auto" else device)
    if level == "auto" and recipe is not None:
        found = choose_level(source, out, how, size, recipe, chosen, noise_correction=noise_correction)
        tell(found.why)
        level = found.name
    if level == "fast" and file is None:
        return level, None, choose_device("cpu")
    return level, recipe, chosen
