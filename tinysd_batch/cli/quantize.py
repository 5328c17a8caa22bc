"""`tinysd-batch quantize`: a model of the user's own at few bits."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinysd_batch.cli.model_options import AllowPickle, Ema, Out, Source, Vae, options, tell
from tinysd_batch.cli.terminal.signals import end_on_sigterm
from tinysd_batch.config import parse_bytes
from tinysd_batch.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tinysd_batch.quantize.presets import Size
    from tinysd_batch.quantize.recipe import Recipe
    from tinysd_batch.quantize.sources.checkpoint_source import Options

MOST_SAMPLE_S = 900.0  # that comparing images may take where nobody asked for it
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
    samples: Annotated[
        bool | None,
        typer.Option(
            "--samples/--no-samples",
            help="Whether fast ends with four images by both models; if not given, where it takes 15 minutes at most.",
            show_default=False,
        ),
    ] = None,
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
        page, is_measured = make_and_report(
            source, out, how, level, recipe, device, size, noise_correction=not no_noise_correction
        )
        if not is_measured and samples is not False:
            compare_samples(source, out, how, device, page, MOST_SAMPLE_S if samples is None else None)
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
) -> tuple[Path, bool]:  # fmt: skip
    """Quantize, measure, and report: the report's page, and whether images were measured, as fast does by a recipe."""
    from tinysd_batch.quantize.calibrated import quantize_calibrated
    from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEEDS
    from tinysd_batch.quantize.data_free import quantize_model
    from tinysd_batch.quantize.evaluate.compare import measure
    from tinysd_batch.quantize.evaluate.sensitivity import harms_of
    from tinysd_batch.quantize.evaluate.summary import summarize
    from tinysd_batch.quantize.sources.open import open_source
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.quality_text import judge
    from tinysd_batch.report.quantization.layer_progress import LayerProgress
    from tinysd_batch.report.quantization.report import median_psnr_db, write_report

    level, recipe, chosen = decide(source, out, how, level, file, device, size, noise_correction=noise_correction)
    if recipe is None or level == "fast":
        with LayerProgress(make_console(stderr=True)) as bar:
            made = quantize_model(source, out, how, bar.say, size, recipe, chosen, bar.show)
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
        tell(f"images: {judge(median_psnr_db(errors))}")
        tell("measuring what each sort of layer harms alone")
        harms = harms_of(open_source(source, how).unet(), out / "unet", made.held_out, recipe.scale, chosen)
    made = replace(made, seconds=made.seconds + time.monotonic() - started)
    summary = summarize(out, made, str(chosen), recipe)
    page = write_report(out, summary, errors, recipe.held_out if recipe else [], harms)
    tell(f"report: {page}")
    return page, errors is not None


def compare_samples(source: Path, out: Path, how: "Options", device: str, page: Path, most_s: float | None) -> None:
    """Generate four images by both models and put them into the report. The model is finished: a failure is a line."""
    from tinysd_batch.errors import TinySDError, is_out_of_memory
    from tinysd_batch.model.device.select import choose_device
    from tinysd_batch.quantize.auto_level import rounded
    from tinysd_batch.quantize.evaluate.samples import PAIRS, generate_pairs, seconds_of_samples
    from tinysd_batch.report.quantization.report import add_samples

    chosen = choose_device(None if device == "auto" else device)
    try:
        seconds = seconds_of_samples(source, how, chosen)
        if most_s is not None and seconds > most_s:
            tell(f"no images were compared, as that takes some {rounded(seconds)} here; --samples does it all the same")
            return
        tell(
            f"{out} is finished; comparing {PAIRS} images with the float model's, some {rounded(seconds)}; "
            f"--no-samples leaves it out"
        )
        tell(f"images: {add_samples(page, generate_pairs(source, out, how, chosen))}")
    except (TinySDError, RuntimeError, MemoryError) as error:
        if not isinstance(error, TinySDError) and not is_out_of_memory(error):
            raise
        tell(f"no images were compared: {error}")


def decide(
    source: Path, out: Path, how: "Options", level: str, file: Path | None, device: str, size: "Size", *,
    noise_correction: bool,
) -> "tuple[str, Recipe | None, torch.device]":  # fmt: skip
    """Level, recipe and device, with a word on the level where it was not asked for."""
    from tinysd_batch.model.device.select import choose_device
    from tinysd_batch.quantize.auto_level import choose_level
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
