"""`tinysd-batch quantize`: quantize a checkpoint to a packed model folder, and report on its quality."""

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
from tinysd_batch.errors import UsageError
from tinysd_batch.settings.memory_budget import parse_bytes

if TYPE_CHECKING:
    import torch

    from tinysd_batch.quantize.presets import SizeTarget
    from tinysd_batch.quantize.recipe import Recipe
    from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions

MAX_DEFAULT_SAMPLES_S = 900.0  # sample images that take longer are only generated with --samples
LEVELS = ("auto", "fast", "calib", "distill")


def quantize_command(
    source: SourceArgument,
    out: OutputArgument,
    level: Annotated[
        str,
        typer.Option(
            "--level",
            help="fast: without calibration data. calib: calibrated on images that the model generates. distill: "
            "calibrated, then fine-tuned. auto: calib if it should take an hour at most, else fast.",
        ),
    ] = "auto",
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="tiny: all layers at 2 bits. default: a few at 4 and 8. quality: most layer types at 4.",
            show_default="default",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", help="Maximum size of the UNet's file, such as 280MB.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="Calibration recipe (TOML): prompts, steps and effort. With --level fast it is used to evaluate the "
            "result.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Calibrate on cpu, cuda or auto.")] = "auto",
    no_noise_correction: Annotated[
        bool, typer.Option("--no-noise-correction", help="Do not fit a noise correction in calib and distill.")
    ] = False,
    samples: Annotated[
        bool | None,
        typer.Option(
            "--samples/--no-samples",
            help="With --level fast, generate four sample images with both models; if not given, only when that takes "
            "15 minutes at most.",
            show_default=False,
        ),
    ] = None,
    allow_pickle: AllowPickleOption = False,
    ema: EmaOption = False,
    vae: VaeOption = None,
) -> None:
    """Quantize the UNet of an SD v1 checkpoint to 2 bits, with a few layers at more, and write a model folder."""
    if level not in LEVELS:
        raise UsageError(f"--level {level}: one of {', '.join(LEVELS)} was expected")
    size = read_size_target(preset, target_size)
    source_options = make_source_options(allow_pickle, ema, vae)
    with exit_on_sigterm():
        page, has_images = quantize_and_report(
            source, out, source_options, level, recipe, device, size, noise_correction=not no_noise_correction
        )
        if not has_images and samples is not False:
            max_s = MAX_DEFAULT_SAMPLES_S if samples is None else None
            add_sample_images(source, out, source_options, device, page, max_s)
    typer.echo(f"{out}: ready for `tinysd-batch submit MANIFEST --model {out}`")


def read_size_target(preset: str | None, target: str | None) -> "SizeTarget":
    """Return what --preset and --target-size ask for. Raises UsageError."""
    from tinysd_batch.quantize.presets import DEFAULT_PRESET, PRESETS, SizeTarget

    if preset is not None and target is not None:
        raise UsageError("--preset and --target-size: each determines the file's size; use only one of them")
    if preset not in (None, *PRESETS):
        raise UsageError(f"--preset {preset}: one of {', '.join(PRESETS)} was expected")
    return SizeTarget(preset or DEFAULT_PRESET, parse_bytes(target, "--target-size"))


def quantize_and_report(
    source: Path,
    out: Path,
    source_options: "SourceOptions",
    level: str,
    recipe_file: Path | None,
    device: str,
    size: "SizeTarget",
    *,
    noise_correction: bool,
) -> tuple[Path, bool]:
    """Quantize, evaluate and report.

    Returns:
        The report's page, and whether images were compared. Level fast compares them only with a recipe.
    """
    from tinysd_batch.quantize.calibrated import quantize_with_calibration
    from tinysd_batch.quantize.calibration.trajectories import HELD_OUT_SEED_OFFSET
    from tinysd_batch.quantize.data_free import quantize_model
    from tinysd_batch.quantize.evaluate.compare import compare_models
    from tinysd_batch.quantize.evaluate.sensitivity import measure_sensitivity
    from tinysd_batch.quantize.evaluate.summary import summarize
    from tinysd_batch.quantize.sources.formats import open_source
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.quality_text import describe_quality
    from tinysd_batch.report.quantization.layer_progress import LayerProgressBar
    from tinysd_batch.report.quantization.report import compute_median_psnr_db, write_report

    level, recipe, torch_device = resolve_level(
        source, out, source_options, level, recipe_file, device, size, noise_correction=noise_correction
    )
    if recipe is None or level == "fast":
        with LayerProgressBar(make_console(stderr=True)) as bar:
            result = quantize_model(source, out, source_options, bar.print_line, size, recipe, torch_device, bar.show)
    else:
        result = quantize_with_calibration(
            source,
            out,
            source_options,
            recipe,
            torch_device,
            print_to_stderr,
            size=size,
            distill=level == "distill",
            noise_correction=noise_correction,
        )
    comparison, sensitivities, started_at = None, None, time.monotonic()
    if recipe is not None and result.held_out is not None:
        print_to_stderr(f"evaluating on {len(recipe.held_out)} held-out prompts")
        seed = recipe.seed + HELD_OUT_SEED_OFFSET
        comparison = compare_models(out, result.held_out, seed, recipe.scale, torch_device)
        print_to_stderr(
            f"compared with the float model: noise prediction {comparison.mean_noise_sqnr_db:.1f} dB, "
            f"final latents {comparison.final_latents_sqnr_db:.1f} dB, images {comparison.psnr_db:.1f} dB"
        )
        print_to_stderr(f"images: {describe_quality(compute_median_psnr_db(comparison))}")
        print_to_stderr("measuring the sensitivity of each layer type")
        unet = open_source(source, source_options).unet()
        sensitivities = measure_sensitivity(unet, out / "unet", result.held_out, recipe.scale, torch_device)
    result = replace(result, duration_s=result.duration_s + time.monotonic() - started_at)
    summary = summarize(out, result, str(torch_device), recipe)
    page = write_report(out, summary, comparison, recipe.held_out if recipe else [], sensitivities)
    print_to_stderr(f"report: {page}")
    return page, comparison is not None


def add_sample_images(
    source: Path, out: Path, source_options: "SourceOptions", device: str, page: Path, max_s: float | None
) -> None:
    """Generate four images with both models and add them to the report, unless that takes more than `max_s`.

    The model is complete by now, so a failure only prints a line.
    """
    from tinysd_batch.errors import TinySDError, is_out_of_memory
    from tinysd_batch.model.device.select import choose_device
    from tinysd_batch.quantize.auto_level import format_duration
    from tinysd_batch.quantize.evaluate.samples import N_PAIRS, estimate_samples_s, generate_image_pairs
    from tinysd_batch.report.quantization.report import add_samples

    torch_device = choose_device(None if device == "auto" else device)
    try:
        estimated_s = estimate_samples_s(source, source_options, torch_device)
        duration = format_duration(estimated_s)
        if max_s is not None and estimated_s > max_s:
            print_to_stderr(f"no sample images: they would take about {duration} here; add --samples to generate them")
            return
        print_to_stderr(
            f"{out} is complete; comparing {N_PAIRS} images with the float model's, which takes about {duration}; "
            f"--no-samples skips this"
        )
        print_to_stderr(f"images: {add_samples(page, generate_image_pairs(source, out, source_options, torch_device))}")
    except (TinySDError, RuntimeError, MemoryError) as error:
        if not isinstance(error, TinySDError) and not is_out_of_memory(error):
            raise
        print_to_stderr(f"no sample images: {error}")


def resolve_level(
    source: Path,
    out: Path,
    source_options: "SourceOptions",
    level: str,
    recipe_file: Path | None,
    device: str,
    size: "SizeTarget",
    *,
    noise_correction: bool,
) -> "tuple[str, Recipe | None, torch.device]":
    """Choose level, recipe and device. Print the reason for a level that was chosen automatically."""
    from tinysd_batch.model.device.select import choose_device
    from tinysd_batch.quantize.auto_level import choose_level
    from tinysd_batch.quantize.recipe import read_recipe

    recipe = None if level == "fast" and recipe_file is None else read_recipe(recipe_file)
    torch_device = choose_device("cpu" if recipe is None else None if device == "auto" else device)
    if level == "auto" and recipe is not None:
        choice = choose_level(
            source, out, source_options, size, recipe, torch_device, noise_correction=noise_correction
        )
        print_to_stderr(choice.reason)
        level = choice.name
    if level == "fast" and recipe_file is None:
        return level, None, choose_device("cpu")
    return level, recipe, torch_device
