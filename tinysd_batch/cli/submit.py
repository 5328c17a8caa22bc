"""`tinysd-batch submit`: run a job, or resume it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.hints import check_manifest_argument
from tinysd_batch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from tinysd_batch.job.dispatch.job_progress import RunSummary
    from tinysd_batch.job.state.job import Job

MANY_IMAGES = 100  # more are worth a warning that the small embedded model generates them

ManifestArgument = Annotated[
    Path | None,
    typer.Argument(
        help="A table with a prompt column (.csv, .tsv, .jsonl, .parquet), a .txt of prompts, each also as .gz, a "
        "job.toml that names one, or the folder of a job to resume.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", "--outdir", help="The job folder; outputs/<manifest name> if not given.", show_default=False
    ),
]


@options.add_setting_options
def submit_command(
    manifest: ManifestArgument = None,
    extra_words: options.ExtraWordsArgument = None,
    from_file: options.FromFileOption = None,
    output: OutputOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Generate only the job's first N images; without it the same command resumes the job.",
            show_default=False,
        ),
    ] = None,
    reuse: options.ReuseOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry images that failed or were quarantined.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Take over the job from another tinysd-batch process that does not respond."),
    ] = False,
    redo_missing: Annotated[
        bool,
        typer.Option(
            "--redo-missing", help="Regenerate images whose files are missing, even if that is more than half of them."
        ),
    ] = False,
    preset: options.PresetOption = None,
    verbose: options.VerboseOption = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Generate images for every row of a manifest. Run the same command again to resume."""
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.reading_progress import ReadingProgress

    manifest_path = choose_manifest(manifest, from_file, extra_words)
    with ReadingProgress(make_console(stderr=True), f"Reading {manifest_path}"):
        job, has_named_model = prepare_from_options(manifest_path, output, preset or [], settings, reuse)
    console = make_console()
    run_options = {"limit": limit, "retry_failed": retry_failed, "take_over": take_over, "redo_missing": redo_missing}
    raise typer.Exit(run_and_report(job, has_named_model, run_options, verbose, console))


def choose_manifest(manifest: Path | None, from_file: Path | None, extra_words: list[str] | None = None) -> Path:
    """Return the manifest: the argument, or tiny-stable-diffusion's option `--from-file`.

    Raises:
        UsageError: Both or none are given, or the argument is not a manifest.
    """
    if manifest is not None and from_file is not None:
        raise UsageError(f"{manifest} and --from-file {from_file}: use only one of them")
    if manifest is not None:
        check_manifest_argument(manifest, extra_words or [])
    if manifest_path := manifest or from_file:
        return manifest_path
    raise UsageError("name a manifest: a .csv or .parquet table with a prompt column, or a .txt, one prompt per line")


def prepare_from_options(
    manifest: Path, output: Path | None, presets: list[Path], settings: dict[str, Any], reuse: Path | None = None
) -> tuple["Job", bool]:
    """Return the job, and whether its model was named. Options override job.toml, which overrides presets."""
    from tinysd_batch.job.state.prepare_job import prepare_job
    from tinysd_batch.settings.sources import read_preset

    return prepare_job(manifest, output, [read_preset(path) for path in presets], settings, reuse)


def run_and_report(
    job: "Job", has_named_model: bool, run_options: dict[str, Any], verbose: bool, console: "Console"
) -> int:
    """Run the job, print its summary and return the exit code. `run_options` are keyword arguments of `run_job`."""
    from tinysd_batch.cli.terminal.log_records import show_log_records
    from tinysd_batch.cli.terminal.signals import stop_on_signals
    from tinysd_batch.job.driver import run_job
    from tinysd_batch.job.open_pool import make_pool_factory
    from tinysd_batch.report.contact_sheet import write_contact_sheet
    from tinysd_batch.report.progress_bar import RunProgressBar

    print_header(job, console)
    with stop_on_signals() as stop, show_log_records(verbose):
        try:
            with RunProgressBar(console, verbose) as progress:
                if not has_named_model:
                    progress.on_start = lambda images: warn_about_embedded_model(images, progress.print_line)
                summary = run_job(job, make_pool_factory(job), progress, lambda: bool(stop), **run_options)
                settings = job.settings
                sheet = None if settings.skip_grid else write_contact_sheet(job.folder, settings.n_rows)
        except KeyboardInterrupt:
            print_resume_command("Stopped immediately", job, console)
            return stop.exit_code
    print_summary(job, summary, sheet, console)
    if summary.stopped:
        return stop.exit_code if stop else 1
    return 3 if summary.failed or summary.invalid_rows else 0


def print_header(job: "Job", console: "Console") -> None:
    from tinysd_batch.report.formatting import print_line

    settings = job.settings
    print_line(
        console,
        f"Model: {job.model.name}, native size {job.model.native_px}x{job.model.native_px}; generating "
        f"{settings.width}x{settings.height}, {settings.steps} steps of {settings.sampler}, scale {settings.scale:g}",
    )
    print_line(console, f"Job: {job.folder}, seed {job.seed}")


def warn_about_embedded_model(images: int, print_line: "Callable[[str], None]") -> None:
    if images > MANY_IMAGES:
        print_line(
            f"{images:,} images will be generated by the small model that ships with tinysd-batch, which knows 286 "
            f"subjects at 64 pixels; name your own with --model, or use --model embedded to hide this warning"
        )


def print_summary(job: "Job", summary: "RunSummary", sheet: Path | None, console: "Console") -> None:
    from tinysd_batch.records import Status
    from tinysd_batch.report.formatting import format_count, format_seconds, print_line

    generated = summary.counts[Status.OK]
    reused = f", {summary.reused:,} reused" if summary.reused else ""
    print_line(
        console,
        f"{format_count(generated, 'image')} generated in {format_seconds(summary.seconds)}{reused}, "
        f"{summary.failed:,} failed",
    )
    if summary.invalid_rows:
        print_line(console, f"{format_count(summary.invalid_rows, 'manifest row')} could not be generated")
    if job.settings.skip_save:
        images_per_s = generated / max(summary.seconds, 1e-3)
        console.print(f"No image was written (--skip_save); {images_per_s:.2f} images/s overall")
    elif (job.folder / "images").exists():
        print_line(console, f"Images: {job.folder / 'images'}")
    if sheet:
        print_line(console, f"Contact sheet: {sheet}")
    for table in (job.folder / "results.parquet", job.folder / "results"):
        if table.exists():
            print_line(console, f"Table: {table}")
    print_remaining(job, summary, console)


def print_remaining(job: "Job", summary: "RunSummary", console: "Console") -> None:
    from tinysd_batch.report.formatting import format_count

    if summary.stopped:
        print_resume_command(f"Stopped with {format_count(summary.left, 'image')} left", job, console)
    elif summary.beyond_limit:
        print_resume_command(f"{format_count(summary.beyond_limit, 'image')} left beyond --limit", job, console)


def print_resume_command(reason: str, job: "Job", console: "Console") -> None:
    """Print the shell command that resumes the job, on one line however narrow the terminal is."""
    folder = str(job.folder)
    folder = f"./{folder}" if folder.startswith("-") else folder  # else it would be read as an option
    console.print(f"{reason}. To resume:", markup=False)
    console.print(f"  tinysd-batch submit {shlex.quote(folder)}", markup=False, soft_wrap=True)
