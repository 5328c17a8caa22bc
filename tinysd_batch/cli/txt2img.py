"""`tinysd-batch txt2img`: one prompt, or a file of them, in this process, as the origin's script."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.hints import raise_missing_prompt
from tinysd_batch.errors import UsageError
from tinysd_batch.text import make_printable

if TYPE_CHECKING:
    from tinysd_batch.config import Settings
    from tinysd_batch.job.manifest.validate import RowDefaults
    from tinysd_batch.records import ImageRequest, InvalidRow, Row

DEFAULT_FOLDER = Path("outputs/txt2img-samples")


@options.add_setting_options
def txt2img(
    words: Annotated[list[str] | None, typer.Argument(help="The prompt, or more of it.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt; loose words are added to it.", show_default=False)
    ] = None,
    from_file: options.FromFileOption = None,
    output: Annotated[
        Path, typer.Option("--outdir", "-o", "--output", help="The folder for the pictures.")
    ] = DEFAULT_FOLDER,
    preset: options.PresetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what memory it takes, and draw nothing.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Draw one prompt. Each picture's seed and path are printed; a second run numbers on."""
    from tinysd_batch.config import merge_settings, read_preset

    text = " ".join([*([prompt] if prompt else []), *(words or [])])
    if text and from_file:
        raise UsageError("a prompt and --from-file: give one of the two")
    if not text.strip() and not from_file:
        raise_missing_prompt()
    resolved = merge_settings(*(read_preset(path) for path in preset or []), settings)
    if dry_run:
        print_memory_estimate(text, from_file, resolved)
    elif generate_images(text, from_file, resolved, output):
        raise typer.Exit(3)


def print_memory_estimate(text: str, from_file: Path | None, settings: "Settings") -> None:
    """Of the largest batch, phase by phase."""
    from tinysd_batch.job.state.job import derive_row_defaults
    from tinysd_batch.job.state.open_job import fill_in_model_defaults
    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.report.plan.memory_table import PlannedBatch, estimate_memory

    model = read_model_info(settings.model)
    settings = fill_in_model_defaults(settings, model)
    rows, _ = read_prompts(text, from_file, derive_row_defaults(settings, model), settings.interpret_lines)
    batches = [
        PlannedBatch(max(row.n_samples, settings.max_batch or 1), row.params.width, row.params.height, row.scale != 1)
        for row in rows
    ]
    largest = max(batches, key=lambda batch: batch.rows * batch.width * batch.height)
    for name, line in estimate_memory(settings, largest).lines().items():
        typer.echo(f"{name:<14} {line}")


def generate_images(text: str, from_file: Path | None, settings: "Settings", output: Path) -> int:
    """Draw the images, print a line for each, and return how many failed."""
    import secrets

    from tinysd_batch.job.state.job import derive_row_defaults, derive_shared_settings
    from tinysd_batch.job.state.open_job import fill_in_model_defaults
    from tinysd_batch.job.workers.pool import choose_cpu_workers
    from tinysd_batch.job.workers.worker import WorkerSetup
    from tinysd_batch.model.checkpoint.info import read_model_info
    from tinysd_batch.report.formatting import format_row_label

    model = read_model_info(settings.model)
    settings = fill_in_model_defaults(settings, model)
    rows, invalid = read_prompts(text, from_file, derive_row_defaults(settings, model), settings.interpret_lines)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; name a folder for the pictures with -o")
    seed = settings.seed if settings.seed is not None else secrets.randbelow(2**31)
    typer.echo(f"Model: {model.name}, {model.native_px}x{model.native_px} pixels by nature; seed {seed}")
    _, threads = choose_cpu_workers(1, 1, model.is_small)
    for row in invalid:
        typer.echo(make_printable(f"{format_row_label(row.number, row.line)} cannot be drawn: {row.reason}"), err=True)
    setup = WorkerSetup.from_settings(
        settings, model, job_folder=output.resolve(), scratch=output.resolve(), threads=threads
    )
    failed = generate_and_print(rows, setup, derive_shared_settings(settings, model, seed), settings, output)
    return failed + len(invalid)


def read_prompts(
    text: str, from_file: Path | None, defaults: "RowDefaults", interpret_lines: bool
) -> tuple[list["Row"], list["InvalidRow"]]:
    """The prompt as a row, or the file's rows in their order, and those that cannot be drawn.

    What was noticed about the file goes to stderr.
    """
    from tinysd_batch.job.manifest.reading_notes import ReadingNotes
    from tinysd_batch.job.manifest.validate import build_row, read_rows
    from tinysd_batch.records import InvalidRow
    from tinysd_batch.report.formatting import format_row_label

    if from_file:
        notes = ReadingNotes()
        found = list(read_rows(from_file, defaults, notes=notes, interpret_lines=interpret_lines))
        for line in notes.lines():
            typer.echo(make_printable(f"{from_file}: {line}"), err=True)
    else:
        found = [build_row(1, {"prompt": text}, defaults)]
    invalid = [row for row in found if isinstance(row, InvalidRow)]
    if len(invalid) == len(found):
        where = f"{from_file}: {format_row_label(invalid[0].number, invalid[0].line)}" if from_file else "the prompt"
        raise UsageError(f"{where} cannot be drawn: {invalid[0].reason}")
    return [row for row in found if not isinstance(row, InvalidRow)], invalid


def generate_and_print(rows: Sequence["Row"], setup: Any, common: Any, settings: "Settings", output: Path) -> int:
    import time

    from tinysd_batch.job.txt2img import generate_rows
    from tinysd_batch.records import Status

    failed, made, started = 0, [], time.monotonic()
    for request, result in generate_rows(rows, setup, common, settings.max_batch):
        if result.status is not Status.OK:
            failed += 1
            typer.echo(make_printable(f"seed {request.seed}: {result.error_message}"), err=True)
            continue
        made.append(request)
        path = "not saved" if settings.skip_save else output / request.file_name
        typer.echo(make_printable(f"{path}  seed {request.seed}"))
    if settings.skip_save:
        typer.echo(f"{len(made)} images in {time.monotonic() - started:.1f} s, loading the model included")
    elif len(made) > 1 and not settings.skip_grid:
        typer.echo(make_printable(f"Grid: {write_run_grid(made, output, settings.n_rows)}"))
    return failed


def write_run_grid(made: Sequence["ImageRequest"], output: Path, n_rows: int) -> Path | None:
    """This run's pictures in one, named after the first."""
    from tinysd_batch.config import MAX_GRID_IMAGES
    from tinysd_batch.report.contact_sheet import SheetImage, format_seed, write_grid
    from tinysd_batch.report.formatting import to_one_line

    several = len({request.prompt for request in made}) > 1
    shown = [
        SheetImage(output / one.file_name, to_one_line(one.prompt, 200) if several else format_seed(one.seed))
        for one in made[:MAX_GRID_IMAGES]
    ]
    return write_grid(shown, output / f"grid_{made[0].index:05d}.png", n_rows)
