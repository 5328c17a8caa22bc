"""Which job is meant: the manifest, job.toml or job folder that is named, and settings from all their sources.

Settings of a job that goes on < preset < job.toml < what is given.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinysd_batch.config import EMBEDDED, Settings, read_job_file, resolve, validate, without_missing
from tinysd_batch.errors import UsageError
from tinysd_batch.job.manifest.readers import format_of
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.job.state.open_job import default_folder, has_images, open_job

# Each says where work is done: one that is given replaces the others of the job.
PLACES = {"inline": ("address", "workers"), "address": ("inline",), "workers": ("inline",)}
OF_ONE_RUN = ("skip_grid", "n_rows")  # what is shown at its end


def prepare_job(
    named: Path, output: Path | None, presets: Sequence[dict[str, Any]], given: dict[str, Any],
    reuse: Path | None = None,
) -> tuple[Job, bool]:  # fmt: skip
    """The job that a manifest, a job.toml or a job folder stands for, and whether its model was named."""
    manifest, folder = named, None
    from_file: dict[str, Any] = {}
    is_named = is_job_folder(named)
    if is_named:
        folder, manifest = named, manifest_of(named, output)
    elif named.suffix == ".toml":
        from_file, manifest, folder = read_job_file(named)
        folder = output or folder or default_folder(named, name_of(named))
    elif os.path.isdir(named):  # noqa: PTH112 - as below
        format_of(named)
    layers = [*presets, from_file, given]
    folder = output or folder or default_folder(manifest)
    settings, goes_on = resolve_with_job(folder, layers, is_named=is_named)
    named_model = goes_on or any(layer.get("model") is not None for layer in layers)
    return open_job(manifest, folder, settings, reuse), named_model


def name_of(job_file: Path) -> str:
    """A job.toml is known by its folder."""
    return job_file.parent.resolve().name if job_file.stem == "job" else job_file.stem


def is_job_folder(path: Path) -> bool:
    return os.path.isfile(path / JOB_FILE)  # noqa: PTH113 - what is no path is no job folder, and no error


def manifest_of(folder: Path, output: Path | None) -> Path:
    """The manifest of the job in `folder`, which is named in a manifest's place. Raises UsageError."""
    if output is not None and output.resolve() != folder.resolve():
        raise UsageError(f"{folder} is a job folder, and -o {output} another one; name the manifest for a new job")
    return Path(read_job_json(folder)["manifest"]["path"])


def resolve_with_job(folder: Path, layers: Sequence[dict[str, Any]], *, is_named: bool) -> tuple[Settings, bool]:
    """Settings from layers over what the job in `folder` began with, and whether there is a job that goes on.

    A job without an image binds nobody: its settings count only where the user names its folder (`is_named`).
    """
    goes_on = is_job_folder(folder) and (is_named or has_images(folder))
    if goes_on:
        given = {name for layer in layers for name in without_missing(layer)}
        layers = [settings_of(folder, given), *layers]
    settings = resolve(*layers)
    return settings.model_copy(update={"address": None}) if settings.address == "local" else settings, goes_on


def settings_of(folder: Path, given: set[str]) -> dict[str, Any]:
    """What the job began with, but for what is given now and what contradicts that. Raises UsageError."""
    saved = read_job_json(folder)
    replaced = {name for place, others in PLACES.items() if place in given for name in others}
    values: Mapping[str, Any] = saved["settings"]
    left_out = {*given, *replaced, *OF_ONE_RUN}
    layer = {name: value for name, value in values.items() if value is not None and name not in left_out}
    if "seed" not in given:
        layer["seed"] = saved["seed"]
    if layer.get("model", EMBEDDED) != EMBEDDED:
        layer["model"] = saved["model"].get("path", layer["model"])
    validate(Settings, layer, f"{folder / JOB_FILE}: settings")
    return layer
