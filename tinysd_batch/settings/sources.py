"""Read settings from job files and presets, check them, and merge the layers: preset < job.toml < option."""

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinysd_batch.errors import UsageError
from tinysd_batch.settings.limits import MAX_TOML_BYTES
from tinysd_batch.settings.schema import EMBEDDED_MODEL, SETTINGS
from tinysd_batch.storage.atomic import read_file
from tinysd_batch.text import decode_text, excerpt, show_value

SettingValues = dict[str, Any]  # some settings by name
MANIFEST_KEY, OUTPUT_KEY, PRESET_KEY = "manifest", "output", "preset"  # of a job.toml, besides settings


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UsageError."""
    try:
        return tomllib.loads(decode_text(read_file(path, MAX_TOML_BYTES)))
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except RecursionError:
        raise UsageError(f"{path}: not valid TOML: nested too deep") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def parse_settings(values: SettingValues, source: str) -> SettingValues:
    """Return the parsed values without those that leave a setting as it is; None undoes what earlier layers set.

    Raises:
        UsageError: Settings are unknown or have values that they cannot have. The message names the source and all of
            them.
    """
    parsed: SettingValues = {}
    errors = []
    for name, value in values.items():
        setting = SETTINGS.get(name)
        if setting is None:
            errors.append(f"{excerpt(name)}: no such setting{suggest_name(name, SETTINGS)}")
        elif not setting.value_type.is_unset(value):
            try:
                parsed[name] = setting.value_type.parse(value)
            except ValueError as error:
                errors.append(f"{name} = {show_value(value)}: {error}")
    if errors:
        raise UsageError(f"{source}: {'; '.join(errors)}")
    return parsed


def suggest_name(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message that suggests a name; empty if none is similar."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def merge_settings(*layers: SettingValues) -> SettingValues:
    """Merge parsed layers of settings, of which later ones win."""
    merged: SettingValues = {}
    for layer in layers:
        merged |= layer
    return {name: value for name, value in merged.items() if value is not None}


def read_preset(path: Path) -> SettingValues:
    """Read and check a preset. Raises UsageError."""
    return parse_settings(read_toml(path), str(path))


def read_job_file(path: Path) -> tuple[SettingValues, Path, Path | None]:
    """Return the settings of a `job.toml` (its presets included), its manifest, and its output folder or None.

    Paths in the file are relative to its folder.
    """
    values = read_toml(path)
    manifest, output, presets = (values.pop(key, None) for key in (MANIFEST_KEY, OUTPUT_KEY, PRESET_KEY))
    presets = [presets] if isinstance(presets, str) else presets or []
    if not isinstance(manifest, str):
        raise UsageError(f"{path}: {MANIFEST_KEY} = {excerpt(manifest)}: name the table of prompts")
    if not isinstance(output, str | None):
        raise UsageError(f"{path}: {OUTPUT_KEY} = {excerpt(output)}: name a folder")
    if not isinstance(presets, list) or not all(isinstance(preset, str) for preset in presets):
        raise UsageError(f"{path}: {PRESET_KEY} = {excerpt(presets)}: a list of file names was expected")
    settings = parse_settings(values, str(path))
    if settings.get("model", EMBEDDED_MODEL) != EMBEDDED_MODEL:
        settings["model"] = str(resolve_relative_path(path, settings["model"]))
    merged: SettingValues = {}
    for preset in presets:
        merged |= read_preset(resolve_relative_path(path, preset))
    output_folder = resolve_relative_path(path, output) if output else None
    return merged | settings, resolve_relative_path(path, manifest), output_folder


def resolve_relative_path(file: Path, target: str) -> Path:
    """Return the path of `target`, which `file` names relative to its own folder."""
    if "\0" in target:
        raise UsageError(f"{file}: {excerpt(target)}: a path cannot contain NUL")
    return Path(os.path.normpath(file.parent / target))
