"""Find the job that the user names by a manifest, job.toml or job folder, and merge settings from all sources.

Precedence, lowest first: settings of the job to resume, presets, job.toml, options of the command line or keyword
arguments.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinysd_batch.errors import UsageError
from tinysd_batch.job.manifest.readers import detect_format
from tinysd_batch.job.state.job import JOB_FILE, Job
from tinysd_batch.job.state.job_json import read_job_json
from tinysd_batch.job.state.open_job import default_job_folder, has_images, open_job
from tinysd_batch.settings.schema import EMBEDDED_MODEL
from tinysd_batch.settings.sources import SettingValues, merge_settings, parse_settings, read_job_file

# Settings that select where the workers run: one that the user gives replaces the saved ones that it contradicts.
CONFLICTING_SETTINGS = {"inline": ("address", "workers"), "address": ("inline",), "workers": ("inline",)}
LOCAL_ADDRESS = "local"  # no address: overrides one that the job has
PER_RUN_SETTINGS = ("skip_grid", "n_rows")  # the contact sheet at the end of a run


def prepare_job(
    target: Path,
    output: Path | None,
    presets: Sequence[SettingValues],
    given: SettingValues,
    reuse: Path | None = None,
) -> tuple[Job, bool]:
    """Open the job that the user names.

    Args:
        target: A manifest, a job.toml or a job folder.
        output: The job folder, if the user names one.
        presets: Settings from preset files, later ones winning.
        given: Settings from the command line or keyword arguments, not parsed yet.
        reuse: Folder of a job whose images are reused.

    Returns:
        The job, and whether the user named its model, now or in an earlier run.

    Raises:
        UsageError: `target` cannot be used, or a setting is invalid.
    """
    manifest, folder = target, None
    from_file: SettingValues = {}
    is_named_folder = is_job_folder(target)
    if is_named_folder:
        folder, manifest = target, read_manifest_path(target, output)
    elif target.suffix == ".toml":
        from_file, manifest, folder = read_job_file(target)
        folder = output or folder or default_job_folder(target, derive_job_name(target))
    elif os.path.isdir(target):  # noqa: PTH112 - see is_job_folder
        detect_format(target)
    layers = [*presets, from_file, parse_settings(given, "settings")]
    folder = output or folder or default_job_folder(manifest)
    values, resumes = resolve_with_saved_settings(folder, layers, is_named_folder=is_named_folder)
    is_model_named = resumes or any(layer.get("model") is not None for layer in layers)
    return open_job(manifest, folder, values, reuse), is_model_named


def derive_job_name(job_file: Path) -> str:
    """Return the name of a job file: that of its folder for a `job.toml`, else its own without the suffix."""
    return job_file.parent.resolve().name if job_file.stem == "job" else job_file.stem


def is_job_folder(path: Path) -> bool:
    """Whether `path` is a job folder; False for text that cannot be a path."""
    return os.path.isfile(path / JOB_FILE)  # noqa: PTH113 - unlike Path.is_file, never raises


def read_manifest_path(folder: Path, output: Path | None) -> Path:
    """Return the manifest of the job in `folder`. Raises UsageError if `output` names another folder."""
    if output is not None and output.resolve() != folder.resolve():
        raise UsageError(
            f"{folder} is a job folder, and -o {output} another one; to start a new job, name the manifest"
        )
    return Path(read_job_json(folder)["manifest"]["path"])


def resolve_with_saved_settings(
    folder: Path, layers: Sequence[SettingValues], *, is_named_folder: bool
) -> tuple[SettingValues, bool]:
    """Merge settings over those of the job in `folder`; also return whether there is a job to resume.

    The settings of a job without images are used only if the user names its folder (`is_named_folder`).
    """
    resumes = is_job_folder(folder) and (is_named_folder or has_images(folder))
    if resumes:
        given = {name for layer in layers for name in layer}
        layers = [read_saved_settings(folder, given), *layers]
    values = merge_settings(*layers)
    if values.get("address") == LOCAL_ADDRESS:
        del values["address"]
    return values, resumes


def read_saved_settings(folder: Path, given: set[str]) -> SettingValues:
    """Return the saved settings of a job without those in `given` or contradicting these. Raises UsageError."""
    saved = read_job_json(folder)
    replaced = {name for setting, others in CONFLICTING_SETTINGS.items() if setting in given for name in others}
    values: Mapping[str, Any] = saved["settings"]
    excluded = {*given, *replaced, *PER_RUN_SETTINGS}
    layer = {name: value for name, value in values.items() if value is not None and name not in excluded}
    if "seed" not in given:
        layer["seed"] = saved["seed"]
    if layer.get("model", EMBEDDED_MODEL) != EMBEDDED_MODEL:
        layer["model"] = saved["model"].get("path", layer["model"])
    return parse_settings(layer, f"{folder / JOB_FILE}: settings")
