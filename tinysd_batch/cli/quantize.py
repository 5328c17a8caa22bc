"""`tinysd-batch quantize`: a model of the user's own at few bits."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from tinysd_batch.config import parse_bytes
from tinysd_batch.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tinysd_batch.quantize.presets import SizeTarget
    from tinysd_batch.quantize.recipe import Recipe
    from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions

MAX_DEFAULT_SAMPLES_S = 900.0  # that comparing images may take where nobody asked for it
LEVELS = ("auto", "fast", "calib", "distill")


def quantize(
    source: SourceArgument,
    out: OutputArgument,
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
    allow_pickle: AllowPickleOption = False,
    ema: EmaOption = False,
    vae: VaeOption = None,
) -> None:
    """Make a model folder of an SD v1 checkpoint with its UNet at 2 bits, a few layers at more."""
    if level not in LEVELS:
        raise UsageError(f"--level {level}: one of {', '.join(LEVELS)} was expected")
    size = read_size_target(preset, target_size)
    how = make_source_options(allow_pickle, ema, vae)
    with exit_on_sigterm():
        page, is_measured = quantize_and_report(
            source, out, how, level, recipe, device, size, noise_correction=not no_noise_correction
        )
        if not is_measured and samples is not False:
            add_sample_images(source, out, how, device, page, MAX_DEFAULT_SAMPLES_S if samples is None else None)
    typer.echo(f"{out}: ready for `tinysd-batch submit MANIFEST --model {out}`")


def read_size_target(preset: str | None, target: str | None) -> "SizeTarget":
    """What the two options ask for. Raises UsageError."""
    from tinysd_batch.quantize.presets import DEFAULT_PRESET, PRESETS, SizeTarget

    if preset is not None and target is not None:
        raise UsageError("--preset and --target-size: each decides the file's size; give one of them")
    if preset not in (None, *PRESETS):
        raise UsageError(f"--preset {preset}: one of {', '.join(PRESETS)} was expected")
    return SizeTarget(preset or DEFAULT_PRESET, parse_bytes(target, "--target-size"))


def quantize_and_report(
    source: Path, out: Path, how: "SourceOptions", level: str, file: Path | None, device: str, size: "SizeTarget", *,
    noise_correction: bool,
) -> tuple[Path, bool]:  # fmt: skip
    """Quantize, measure, and report: the report's page, and whether images were measured, as fast does by a recipe."""
    from tinysd_batch.quantize.calibrated import quantize_with_calibration
    from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEED_OFFSET
    from tinysd_batch.quantize.data_free import quantize_model
    from tinysd_batch.quantize.evaluate.compare import compare_models
    from tinysd_batch.quantize.evaluate.sensitivity import measure_sensitivity
    from tinysd_batch.quantize.evaluate.summary import summarize
    from tinysd_batch.quantize.sources.open import open_source
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.quality_text import describe_quality
    from tinysd_batch.report.quantization.layer_progress import LayerProgressBar
    from tinysd_batch.report.quantization.report import compute_median_psnr_db, write_report

    level, recipe, chosen = resolve_level(
        source, out, how, level, file, device, size, noise_correction=noise_correction
    )
    if recipe is None or level == "fast":
        with LayerProgressBar(make_console(stderr=True)) as bar:
            made = quantize_model(source, out, how, bar.print_line, size, recipe, chosen, bar.show)
    else:
        made = quantize_with_calibration(
            source, out, how, recipe, chosen, print_to_stderr,
            size=size, distill=level == "distill", noise_correction=noise_correction,
        )  # fmt: skip
    errors, harms, started = None, None, time.monotonic()
    if recipe is not None and made.held_out is not None:
        print_to_stderr(f"measuring on {len(recipe.held_out)} held-out prompts")
        errors = compare_models(out, made.held_out, recipe.seed + HELD_OUT_SEED_OFFSET, recipe.scale, chosen)
        print_to_stderr(
            f"against the float model: noise prediction {errors.mean_noise_sqnr_db:.1f} dB, "
            f"final latents {errors.final_latents_sqnr_db:.1f} dB, pictures {errors.psnr_db:.1f} dB"
        )
        print_to_stderr(f"images: {describe_quality(compute_median_psnr_db(errors))}")
        print_to_stderr("measuring what each sort of layer harms alone")
        harms = measure_sensitivity(open_source(source, how).unet(), out / "unet", made.held_out, recipe.scale, chosen)
    made = replace(made, duration_s=made.duration_s + time.monotonic() - started)
    summary = summarize(out, made, str(chosen), recipe)
    page = write_report(out, summary, errors, recipe.held_out if recipe else [], harms)
    print_to_stderr(f"report: {page}")
    return page, errors is not None


def add_sample_images(
    source: Path, out: Path, how: "SourceOptions", device: str, page: Path, most_s: float | None
) -> None:
    """Generate four images by both models and put them into the report. The model is finished: a failure is a line."""
    from tinysd_batch.errors import TinySDError, is_out_of_memory
    from tinysd_batch.model.device.select import choose_device
    from tinysd_batch.quantize.auto_level import format_duration
    from tinysd_batch.quantize.evaluate.samples import N_PAIRS, estimate_samples_s, generate_image_pairs
    from tinysd_batch.report.quantization.report import add_samples

    chosen = choose_device(None if device == "auto" else device)
    try:
        seconds = estimate_samples_s(source, how, chosen)
        if most_s is not None and seconds > most_s:
            print_to_stderr(
                f"no images were compared, as that takes some {format_duration(seconds)} here; --samples does it all the same"
            )
            return
        print_to_stderr(
            f"{out} is finished; comparing {N_PAIRS} images with the float model's, some {format_duration(seconds)}; "
            f"--no-samples leaves it out"
        )
        print_to_stderr(f"images: {add_samples(page, generate_image_pairs(source, out, how, chosen))}")
    except (TinySDError, RuntimeError, MemoryError) as error:
        if not isinstance(error, TinySDError) and not is_out_of_memory(error):
            raise
        print_to_stderr(f"no images were compared: {error}")


def resolve_level(
    source: Path, out: Path, how: "SourceOptions", level: str, file: Path | None, device: str, size: "SizeTarget", *,
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
        print_to_stderr(found.reason)
        level = found.name
    if level == "fast" and file is None:
        return level, None, choose_device("cpu")
    return level, recipe, chosen
