"""Go on with a job by its folder: the manifest and the settings that it began with, under those that are given now."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinysd_batch.config import EMBEDDED, Settings, resolve, validate
from tinysd_batch.errors import UsageError
from tinysd_batch.job.folder import has_images
from tinysd_batch.job.job_json import JOB_FILE, read_job_json

# Each says where work is done: one that is given replaces the others of the job.
PLACES = {"inline": ("address", "workers"), "address": ("inline",), "workers": ("inline",)}
OF_ONE_RUN = ("skip_grid", "n_rows")  # what is shown at its end


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
        given = {name for layer in layers for name, value in layer.items() if value is not None}
        layers = [settings_of(folder, given), *layers]
    settings = resolve(*layers)
    return settings.model_copy(update={"address": None}) if settings.address == "local" else settings, goes_on


def settings_of(folder: Path, given: set[str]) -> dict[str, Any]:
    """What the job began with, but for what contradicts what is given now. Raises UsageError."""
    saved = read_job_json(folder)
    replaced = {name for place, others in PLACES.items() if place in given for name in others}
    values: Mapping[str, Any] = saved["settings"]
    left_out = {*replaced, *OF_ONE_RUN}
    layer = {name: value for name, value in values.items() if value is not None and name not in left_out}
    layer["seed"] = saved["seed"]
    if layer.get("model", EMBEDDED) != EMBEDDED:
        layer["model"] = saved["model"].get("path", layer["model"])
    validate(Settings, layer, f"{folder / JOB_FILE}: settings")
    return layer
