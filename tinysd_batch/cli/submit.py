"""`tinysd-batch submit`: run a job, or go on with it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.cli.hints import check_manifest_argument
from tinysd_batch.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tinysd_batch.job.dispatch.job_progress import RunSummary
    from tinysd_batch.job.state.job import Job

MANY_IMAGES = 100


ManifestArgument = Annotated[
    Path | None,
    typer.Argument(
        help="A table with a prompt column (.csv, .tsv, .jsonl, .parquet), a .txt of prompts, any of these also as "
        ".gz, a job.toml that names one, or the folder of a job to go on with.",
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
def submit(
    manifest: ManifestArgument = None,
    more_words: options.ExtraWordsArgument = None,
    from_file: options.FromFileOption = None,
    output: OutputOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="How many workers; one per GPU, or a few on the CPU, if not given.",
            show_default=False,
        ),
    ] = None,
    inline: Annotated[
        bool | None,
        typer.Option("--inline/--no-inline", help="One worker in this process, without Ray.", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="A Ray cluster to work on, as `ray start` printed it, auto for the one this machine belongs to, or "
            "local for this machine alone (default).",
            show_default=False,
        ),
    ] = None,
    worker_wait: Annotated[
        float | None,
        typer.Option(
            "--worker-wait",
            metavar="SECONDS",
            help="How long to wait for a GPU where a cluster has none left; 600 if not given.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Only the job's first N images; the same command without it goes on.",
            show_default=False,
        ),
    ] = None,
    reuse: options.ReuseOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try images again that failed or were quarantined.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Take the job from another tinysd-batch that has it and does not answer."),
    ] = False,
    redo_missing: Annotated[
        bool,
        typer.Option(
            "--redo-missing", help="Generate images again whose files are gone, even if that is more than half of them."
        ),
    ] = False,
    preset: options.PresetOption = None,
    strict: options.StrictOption = False,
    verbose: options.VerboseOption = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Draw every prompt of a table. The same command again goes on where it was stopped."""
    from tinysd_batch.report.console import make_console
    from tinysd_batch.report.reading_progress import ReadingProgress

    flags = {
        **settings, "workers": workers, "inline": inline, "address": address, "worker_wait": worker_wait,
        "strict": strict or None,
    }  # fmt: skip
    chosen = choose_manifest(manifest, from_file, more_words)
    with ReadingProgress(make_console(stderr=True), f"Reading {chosen}"):
        job, named_model = prepare_from_options(chosen, output, preset or [], flags, reuse)
    console = make_console()
    how = {"limit": limit, "retry_failed": retry_failed, "take_over": take_over, "redo_missing": redo_missing}
    raise typer.Exit(run_and_report(job, named_model, how, verbose, console))


def choose_manifest(manifest: Path | None, from_file: Path | None, more_words: list[str] | None = None) -> Path:
    """The origin names its file of prompts by an option; ours is an argument."""
    if manifest is not None and from_file is not None:
        raise UsageError(f"{manifest} and --from-file {from_file}: give one of the two")
    if manifest is not None:
        check_manifest_argument(manifest, more_words or [])
    if chosen := manifest or from_file:
        return chosen
    raise UsageError("name a manifest: a .csv or .parquet table with a prompt column, or a .txt with a prompt a line")


def prepare_from_options(
    manifest: Path, output: Path | None, presets: list[Path], flags: dict[str, Any], reuse: Path | None = None
) -> tuple["Job", bool]:
    """The job, and whether its model was named: preset < job.toml < flag."""
    from tinysd_batch.config import read_preset
    from tinysd_batch.job.state.prepare_job import prepare_job

    return prepare_job(manifest, output, [read_preset(path) for path in presets], flags, reuse)


def run_and_report(job: "Job", named_model: bool, how: dict[str, Any], verbose: bool, console: "Console") -> int:
    """Run the job and return the exit code. `how` goes to `run_job`."""
    from tinysd_batch.cli.terminal.signals import stop_on_signals
    from tinysd_batch.job.driver import run_job
    from tinysd_batch.job.open_pool import make_pool_factory
    from tinysd_batch.report.contact_sheet import write_contact_sheet
    from tinysd_batch.report.progress_bar import RunProgressBar

    print_header(job, console)
    with stop_on_signals() as stop:
        try:
            with RunProgressBar(console, verbose) as progress:
                if not named_model:
                    progress.on_start = lambda images: warn_about_embedded_model(images, progress.print_line)
                summary = run_job(job, make_pool_factory(job), progress, lambda: bool(stop), **how)
                settings = job.settings
                sheet = None if settings.skip_grid else write_contact_sheet(job.folder, settings.n_rows)
        except KeyboardInterrupt:
            print_resume_command("Stopped at once", job, console)
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
        f"Model: {job.model.name}, {job.model.native_px}x{job.model.native_px} pixels by nature; drawing "
        f"{settings.width}x{settings.height}, {settings.steps} steps of {settings.sampler}, scale {settings.scale:g}",
    )
    print_line(console, f"Job: {job.folder}, seed {job.seed}")


def warn_about_embedded_model(images: int, print_line: Any) -> None:
    if images > MANY_IMAGES:
        print_line(
            f"{images:,} images will be drawn by the small model that ships with tinysd-batch, which knows 286 "
            f"things at 64 pixels; name your own with --model, or this one with --model embedded"
        )


def print_summary(job: "Job", summary: "RunSummary", sheet: Path | None, console: "Console") -> None:
    from tinysd_batch.records import Status
    from tinysd_batch.report.formatting import count, format_seconds, print_line

    made = summary.counts[Status.OK]
    reused = f", {summary.reused:,} reused" if summary.reused else ""
    print_line(
        console, f"{count(made, 'image')} made in {format_seconds(summary.seconds)}{reused}, {summary.failed:,} failed"
    )
    if summary.invalid_rows:
        print_line(console, f"{count(summary.invalid_rows, 'manifest row')} could not be made")
    if job.settings.skip_save:
        console.print(f"No picture was written (--skip_save); {made / max(summary.seconds, 1e-3):.2f} images/s in all")
    elif (job.folder / "images").exists():
        print_line(console, f"Pictures: {job.folder / 'images'}")
    if sheet:
        print_line(console, f"Contact sheet: {sheet}")
    for table in (job.folder / "results.parquet", job.folder / "results"):
        if table.exists():
            print_line(console, f"Table: {table}")
    print_remaining(job, summary, console)


def print_remaining(job: "Job", summary: "RunSummary", console: "Console") -> None:
    from tinysd_batch.report.formatting import count

    if summary.stopped:
        print_resume_command(f"Stopped with {count(summary.left, 'image')} left", job, console)
    elif summary.beyond_limit:
        print_resume_command(f"{count(summary.beyond_limit, 'image')} left beyond --limit", job, console)


def print_resume_command(what: str, job: "Job", console: "Console") -> None:
    """The line to type, for a shell; whole, however narrow the terminal is."""
    folder = str(job.folder)
    folder = f"./{folder}" if folder.startswith("-") else folder  # no option
    console.print(f"{what}. To go on:", markup=False)
    console.print(f"  tinysd-batch submit {shlex.quote(folder)}", markup=False, soft_wrap=True)
