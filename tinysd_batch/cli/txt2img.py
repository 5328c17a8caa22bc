"""`tinysd-batch txt2img`: one prompt, in this process, as the origin's script."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tinysd_batch.cli import options
from tinysd_batch.errors import TinySDError, UsageError

DEFAULT_FOLDER = Path("outputs/txt2img-samples")


def txt2img(
    words: Annotated[list[str] | None, typer.Argument(help="The prompt, or more of it.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt; loose words are added to it.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--outdir", "-o", "--output", help="The folder for the pictures.")
    ] = DEFAULT_FOLDER,
    model: options.Model = None,
    seed: options.Seed = None,
    negative_prompt: options.NegativePrompt = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    scale: options.Scale = None,
    sampler: options.Sampler = None,
    eta: options.Eta = None,
    n_iter: options.NIter = None,
    n_samples: options.NSamples = None,
    precision: options.Precision = None,
    device: options.Device = None,
    vram_budget: options.VramBudget = None,
) -> None:
    """Draw one prompt. Each picture's seed and path are printed; a second run numbers on."""
    text = " ".join([*([prompt] if prompt else []), *(words or [])])
    values: dict[str, Any] = {
        "model": model,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "steps": steps,
        "scale": scale,
        "sampler": sampler,
        "eta": eta,
        "n_iter": n_iter,
        "n_samples": n_samples,
        "precision": precision,
        "device": device,
        "vram_budget": vram_budget,
    }
    if draw(text, values, output):
        raise typer.Exit(3)


def draw(text: str, values: dict[str, Any], output: Path) -> int:
    """Draw the prompt's images, print a line for each, and return how many failed."""
    import secrets

    from tinysd_batch.config import resolve
    from tinysd_batch.job.folder import fill_in_model_defaults
    from tinysd_batch.job.manifest import Defaults, check_row
    from tinysd_batch.job.pool import cpu_workers
    from tinysd_batch.job.single import draw_row
    from tinysd_batch.job.worker import WorkerSetup
    from tinysd_batch.model.info import read_model_info
    from tinysd_batch.records import InvalidRow, Status

    settings = resolve(values)
    info = read_model_info(settings.model)
    settings = fill_in_model_defaults(settings, info)
    chosen = settings.model_dump(include=set(Defaults.__dataclass_fields__) - {"step_px"})
    row = check_row(1, {"prompt": text}, Defaults(step_px=info.step_px, **chosen))
    if isinstance(row, InvalidRow):
        raise UsageError(f"the prompt cannot be drawn: {row.reason}")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; name a folder for the pictures with -o")
    seed = settings.seed if settings.seed is not None else secrets.randbelow(2**31)
    typer.echo(f"Model: {info.name}, {info.native_px}x{info.native_px} pixels by nature; seed {seed}")
    _, threads = cpu_workers(1, 1, info.is_small)
    setup = WorkerSetup(
        job_folder=output.resolve(),
        scratch=output.resolve(), model_path=info.path.resolve(), model_name=info.name, model_digest=info.digest,
        device=settings.device, precision=settings.precision, vram_budget=settings.vram_budget, threads=threads,
    )  # fmt: skip
    failed = 0
    for request, result in draw_row(row, setup, seed):
        if result.status is Status.OK:
            typer.echo(f"{output / request.file_name}  seed {request.seed}")
        else:
            failed += 1
            typer.echo(str(TinySDError(f"seed {request.seed}: {result.error_message}")), err=True)
    return failed
