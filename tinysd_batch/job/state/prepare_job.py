"""Which job is meant: the manifest, job.toml or job folder that is named, and settings from all their sources.

Settings of a job that goes on < preset < job.toml < what is given.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinysd_batch.config import EMBEDDED_MODEL, Settings, drop_unset, merge_settings, read_job_file, validate_settings
from tinysd_batch.errors import UsageError
from tinysd_batch.job.manifest.readers import detect_format
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.job.state.open_job import default_job_folder, has_images, open_job

# Each says where work is done: one that is given replaces the others of the job.
CONFLICTING_SETTINGS = {"inline": ("address", "workers"), "address": ("inline",), "workers": ("inline",)}
PER_RUN_SETTINGS = ("skip_grid", "n_rows")  # what is shown at its end


def prepare_job(
    named: Path, output: Path | None, presets: Sequence[dict[str, Any]], given: dict[str, Any],
    reuse: Path | None = None,
) -> tuple[Job, bool]:  # fmt: skip
    """The job that a manifest, a job.toml or a job folder stands for, and whether its model was named."""
    manifest, folder = named, None
    from_file: dict[str, Any] = {}
    is_named = is_job_folder(named)
    if is_named:
        folder, manifest = named, read_manifest_path(named, output)
    elif named.suffix == ".toml":
        from_file, manifest, folder = read_job_file(named)
        folder = output or folder or default_job_folder(named, derive_job_name(named))
    elif os.path.isdir(named):  # noqa: PTH112 - as below
        detect_format(named)
    layers = [*presets, from_file, given]
    folder = output or folder or default_job_folder(manifest)
    settings, goes_on = resolve_with_saved_settings(folder, layers, is_named=is_named)
    named_model = goes_on or any(layer.get("model") is not None for layer in layers)
    return open_job(manifest, folder, settings, reuse), named_model


def derive_job_name(job_file: Path) -> str:
    """A job.toml is known by its folder."""
    return job_file.parent.resolve().name if job_file.stem == "job" else job_file.stem


def is_job_folder(path: Path) -> bool:
    return os.path.isfile(path / JOB_FILE)  # noqa: PTH113 - what is no path is no job folder, and no error


def read_manifest_path(folder: Path, output: Path | None) -> Path:
    """The manifest of the job in `folder`, which is named in a manifest's place. Raises UsageError."""
    if output is not None and output.resolve() != folder.resolve():
        raise UsageError(f"{folder} is a job folder, and -o {output} another one; name the manifest for a new job")
    return Path(read_job_json(folder)["manifest"]["path"])


def resolve_with_saved_settings(
    folder: Path, layers: Sequence[dict[str, Any]], *, is_named: bool
) -> tuple[Settings, bool]:
    """Settings from layers over what the job in `folder` began with, and whether there is a job that goes on.

    A job without an image binds nobody: its settings count only where the user names its folder (`is_named`).
    """
    goes_on = is_job_folder(folder) and (is_named or has_images(folder))
    if goes_on:
        given = {name for layer in layers for name in drop_unset(layer)}
        layers = [read_saved_settings(folder, given), *layers]
    settings = merge_settings(*layers)
    return settings.model_copy(update={"address": None}) if settings.address == "local" else settings, goes_on


def read_saved_settings(folder: Path, given: set[str]) -> dict[str, Any]:
    """What the job began with, but for what is given now and what contradicts that. Raises UsageError."""
    saved = read_job_json(folder)
    replaced = {name for place, others in CONFLICTING_SETTINGS.items() if place in given for name in others}
    values: Mapping[str, Any] = saved["settings"]
    left_out = {*given, *replaced, *PER_RUN_SETTINGS}
    layer = {name: value for name, value in values.items() if value is not None and name not in left_out}
    if "seed" not in given:
        layer["seed"] = saved["seed"]
    if layer.get("model", EMBEDDED_MODEL) != EMBEDDED_MODEL:
        layer["model"] = saved["model"].get("path", layer["model"])
    validate_settings(Settings, layer, f"{folder / JOB_FILE}: settings")
    return layer
