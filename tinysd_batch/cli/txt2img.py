"""`tinysd-batch txt2img`: generate images for one prompt, or a file of prompts, in this process.

It accepts the command lines of tiny-stable-diffusion's script.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.hints import raise_missing_prompt
from tinysd_batch.errors import UsageError
from tinysd_batch.text import make_printable

if TYPE_CHECKING:
    from tinysd_batch.model.checkpoint.info import ModelInfo
    from tinysd_batch.records import ImageRequest, InvalidRow, Row
    from tinysd_batch.settings.schema import Settings

DEFAULT_FOLDER = Path("outputs/txt2img-samples")


@options.add_image_setting_options
def txt2img_command(
    words: Annotated[list[str] | None, typer.Argument(help="The prompt.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt; words of the argument follow it.", show_default=False)
    ] = None,
    from_file: options.FromFileOption = None,
    output: Annotated[
        Path, typer.Option("--outdir", "-o", "--output", help="The folder for the images.")
    ] = DEFAULT_FOLDER,
    preset: options.PresetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimated memory only.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Generate images for one prompt and print their seeds and paths. A second run continues their numbers."""
    from tinysd_batch.job.state.open_job import resolve_settings
    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.settings.schema import EMBEDDED_MODEL
    from tinysd_batch.settings.sources import merge_settings, parse_settings, read_preset

    text = " ".join([*([prompt] if prompt else []), *(words or [])])
    if text and from_file:
        raise UsageError("a prompt and --from-file: use only one of them")
    if not text.strip() and not from_file:
        raise_missing_prompt()
    presets = (read_preset(path) for path in preset or [])
    values = merge_settings(*presets, parse_settings(settings, "settings"))
    model = read_model_info(values.get("model", EMBEDDED_MODEL))
    resolved = resolve_settings(values, model)
    if dry_run:
        print_memory_estimate(text, from_file, resolved, model)
    elif generate_images(text, from_file, resolved, model, output):
        raise typer.Exit(3)


def print_memory_estimate(text: str, from_file: Path | None, settings: "Settings", model: "ModelInfo") -> None:
    """Print the memory of the largest micro-batch, stage by stage."""
    from tinysd_batch.report.plan.memory_table import PlannedBatch, estimate_memory

    rows, _ = read_prompts(text, from_file, settings, model)
    batches = [PlannedBatch.of_row(row, settings.max_batch) for row in rows]
    largest = max(batches, key=lambda batch: batch.unet_pixels)
    for name, line in estimate_memory(settings, largest).lines().items():
        typer.echo(f"{name:<14} {line}")


def generate_images(text: str, from_file: Path | None, settings: "Settings", model: "ModelInfo", output: Path) -> int:
    """Generate the images, print a line for each, and return how many failed."""
    import secrets

    from tinysd_batch.job.plan.batches import SharedSettings
    from tinysd_batch.job.workers.pool import choose_cpu_workers
    from tinysd_batch.job.workers.worker import WorkerSetup
    from tinysd_batch.report.formatting import format_row_label

    rows, invalid = read_prompts(text, from_file, settings, model)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; name a folder for the images with -o")
    seed = settings.seed if settings.seed is not None else secrets.randbelow(2**31)
    typer.echo(f"Model: {model.name}, native size {model.native_px}x{model.native_px}; seed {seed}")
    _, threads = choose_cpu_workers(1, 1, model.is_small)
    for row in invalid:
        label = format_row_label(row.number, row.line)
        typer.echo(make_printable(f"{label} cannot be generated: {row.reason}"), err=True)
    setup = WorkerSetup.from_settings(
        settings, model, job_folder=output.resolve(), scratch=output.resolve(), threads=threads
    )
    failed = generate_and_print(
        rows, setup, SharedSettings.from_settings(seed, model.digest, settings), settings, output
    )
    return failed + len(invalid)


def read_prompts(
    text: str, from_file: Path | None, settings: "Settings", model: "ModelInfo"
) -> tuple[list["Row"], list["InvalidRow"]]:
    """Return the valid and the invalid rows: the prompt as one row, or the rows of the file in order.

    Print notes about the file to stderr.

    Raises:
        UsageError: No row is valid.
    """
    from tinysd_batch.job.manifest.reading_notes import ReadingNotes
    from tinysd_batch.job.manifest.validate import RowDefaults, build_row, read_rows
    from tinysd_batch.records import InvalidRow
    from tinysd_batch.report.formatting import format_row_label

    defaults = RowDefaults(settings, model)
    if from_file:
        notes = ReadingNotes()
        rows = list(read_rows(from_file, defaults, notes=notes, interpret_lines=settings.interpret_lines))
        for line in notes.lines():
            typer.echo(make_printable(f"{from_file}: {line}"), err=True)
    else:
        rows = [build_row(1, {"prompt": text}, defaults)]
    invalid = [row for row in rows if isinstance(row, InvalidRow)]
    if len(invalid) == len(rows):
        source = f"{from_file}: {format_row_label(invalid[0].number, invalid[0].line)}" if from_file else "the prompt"
        raise UsageError(f"{source} cannot be generated: {invalid[0].reason}")
    return [row for row in rows if not isinstance(row, InvalidRow)], invalid


def generate_and_print(rows: Sequence["Row"], setup: Any, common: Any, settings: "Settings", output: Path) -> int:
    """Generate the rows, print a line for each image, write the grid, and return how many images failed."""
    import time

    from tinysd_batch.job.txt2img import generate_rows
    from tinysd_batch.records import Status

    failed, generated, started_at = 0, [], time.monotonic()
    for request, result in generate_rows(rows, setup, common, settings.max_batch):
        if result.status is not Status.OK:
            failed += 1
            typer.echo(make_printable(f"seed {request.seed}: {result.error_message}"), err=True)
            continue
        generated.append(request)
        path = "not saved" if settings.skip_save else output / request.file_name
        typer.echo(make_printable(f"{path}  seed {request.seed}"))
    if settings.skip_save:
        typer.echo(f"{len(generated)} images in {time.monotonic() - started_at:.1f} s, including loading the model")
    elif len(generated) > 1 and not settings.skip_grid:
        typer.echo(make_printable(f"Grid: {write_run_grid(generated, output, settings.n_rows)}"))
    return failed


def write_run_grid(requests: Sequence["ImageRequest"], output: Path, n_rows: int) -> Path | None:
    """Write the images of this run as a grid, numbered like the first of them."""
    from tinysd_batch.report.contact_sheet import SheetImage, format_seed, write_grid
    from tinysd_batch.report.formatting import to_one_line
    from tinysd_batch.settings.limits import MAX_GRID_IMAGES

    has_several_prompts = len({request.prompt for request in requests}) > 1
    images = [
        SheetImage(
            output / request.file_name,
            to_one_line(request.prompt, 200) if has_several_prompts else format_seed(request.seed),
        )
        for request in requests[:MAX_GRID_IMAGES]
    ]
    return write_grid(images, output / f"grid_{requests[0].index:05d}.png", n_rows)
