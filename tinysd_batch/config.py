"""Settings of a job: their types, bounds and defaults, and how layers are merged (preset < job.toml < option)."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinysd_batch.errors import UsageError
from tinysd_batch.storage.atomic import read_file
from tinysd_batch.text import decode_text, excerpt, normalize_text
from tinysd_batch.values import is_missing_number, is_nan, parse_integer

SAMPLERS = ("plms", "ddim", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_2m", "unipc")
SAMPLERS_WITH_ETA = ("plms", "ddim")  # the others ignore eta

MAX_STEPS = 1000  # SD v1 has 1000 noise levels
MAX_SIDE_PX = 2048
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 10_000
MAX_IMAGES_PER_ROW = 100_000
MAX_GRID_IMAGES = 100
MAX_TOML_BYTES = 1_000_000
EMBEDDED_MODEL = "embedded"
BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

# Names of our samplers in k-diffusion, the web UI, ComfyUI and InvokeAI, and the scheduler classes of diffusers; in the
# form that `normalize_sampler_name` returns.
SAMPLER_ALIASES = {
    **{name.replace("_", ""): name for name in SAMPLERS},
    "pndm": "plms",
    "eulerancestral": "euler_a",
    "dpm2ancestral": "dpm2_a",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolverpp2m": "dpmpp_2m",
    "unipcmultistep": "unipc",
}
# Sigma schedules with which such names can end.
SIGMA_SCHEDULES = {
    "karras": "Karras", "ka": "Karras", "polyexponential": "polyexponential", "exponential": "exponential",
    "sgmuniform": "SGM uniform", "ddimuniform": "DDIM uniform", "uniform": "uniform", "normal": "normal",
    "simple": "simple", "beta": "beta", "linearquadratic": "linear quadratic", "kloptimal": "KL optimal",
    "alignyoursteps": "align your steps", "ays": "align your steps", "automatic": "automatic", "turbo": "turbo",
}  # fmt: skip


def find_sampler(name: str) -> str:
    """Return our name of a sampler from a name in other programs, e.g. `Euler a`, `DPM++ 2M` or `k_dpm_2_ancestral`.

    Raises ValueError for an unknown sampler, and for a name with a sigma schedule, as these are not supported.
    """
    if sampler := look_up_sampler(normalize_sampler_name(name)):
        return sampler
    for sampler, schedule in split_off_schedules(name):
        raise ValueError(
            f"{sampler} is supported, but its {schedule} schedule is not; write {sampler} for the model's own schedule"
        )
    raise ValueError(f"no such sampler; one of {', '.join(SAMPLERS)}")


def normalize_sampler_name(name: str) -> str:
    """Return `kdpm2ancestral` for `k_dpm_2_ancestral`, `euler` for `diffusers.EulerDiscreteScheduler`."""
    normalized = normalize_text(name).strip().rpartition(".")[2].lower().replace("++", "pp")
    normalized = re.sub(r"[\W_]+", "", normalized).removeprefix("sample").removesuffix("scheduler")
    return normalized.replace("discrete", "")


def look_up_sampler(normalized: str) -> str | None:
    """Return our name of a sampler, with or without the "k" that marks k-diffusion's samplers."""
    return SAMPLER_ALIASES.get(normalized) or SAMPLER_ALIASES.get(normalized.removeprefix("k"))


def split_off_schedules(name: str) -> Iterator[tuple[str, str]]:
    """Yield each way to read the name as a sampler followed by a sigma schedule."""
    normalized = normalize_sampler_name(name)
    for ending, schedule in SIGMA_SCHEDULES.items():
        if normalized.endswith(ending) and (sampler := look_up_sampler(normalized.removesuffix(ending))):
            yield sampler, schedule
    # InvokeAI's dpmpp_2m_k
    if re.search(r"[\s_-]k$", name.strip().lower()) and (sampler := look_up_sampler(normalized.removesuffix("k"))):
        yield sampler, "Karras"


INTEGER_SETTINGS = (
    "height", "width", "steps", "n_iter", "n_samples", "seed", "quality", "n_rows", "unet_bs", "max_batch", "workers",
    "C", "f",
)  # fmt: skip
FLOAT_SETTINGS = ("scale", "eta", "worker_wait")
TEXT_SETTINGS = (
    "negative_prompt", "prompt_syntax", "sampler", "rng", "precision", "format", "device", "vram_budget", "address",
)  # fmt: skip


def normalize_settings(values: Any) -> Any:
    """Normalize settings as cells of a manifest: `30.0` is 30, NaN and a seed of -1 are unset, text is normalized."""
    if not isinstance(values, dict):
        return values
    normalized: dict[str, Any] = {}
    for name, value in values.items():
        if name in INTEGER_SETTINGS or name in FLOAT_SETTINGS:
            if is_missing_number(value) or (name == "seed" and value in (-1, "-1")):
                continue
            normalized[name] = to_integer_if_possible(value) if name in INTEGER_SETTINGS else value
        else:
            normalized[name] = normalize_text(value) if name in TEXT_SETTINGS and isinstance(value, str) else value
    return normalized


def to_integer_if_possible(value: Any) -> Any:
    """Return the integer, or any other value as it is, so that pydantic reports it."""
    try:
        return parse_integer(value)
    except ValueError:
        return value


def check_address(address: str) -> str:
    """Check the address of a Ray cluster as `ray start` prints it. Raises ValueError."""
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if address not in ("auto", "local") and not (host and is_port):
        raise ValueError("auto, local or HOST:PORT was expected, as `ray start` prints it")
    if "/" in host:
        raise ValueError("HOST:PORT was expected, without ray:// before it")
    return address


class Settings(BaseModel):
    """All settings of a job. None selects the model's default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    _normalize = model_validator(mode="before")(normalize_settings)

    # Settings that decide the pixels; most of them are defaults that a row can override.
    model: str = EMBEDDED_MODEL
    negative_prompt: str = ""
    prompt_syntax: Literal["seed", "a1111", "none"] = "seed"
    long_prompts: bool = False
    height: int | None = Field(None, ge=8, le=MAX_SIDE_PX)
    width: int | None = Field(None, ge=8, le=MAX_SIDE_PX)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    scale: float | None = Field(None, ge=0, le=100)
    sampler: Annotated[str, AfterValidator(find_sampler)] = "plms"
    eta: float = Field(0.0, ge=0, le=1)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES_PER_ROW)
    n_samples: int = Field(1, ge=1, le=1024)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    fixed_code: bool = False
    rng: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["auto", "full", "autocast"] = "auto"

    # How images are saved.
    format: Literal["png", "jpg", "webp"] = "png"
    quality: int = Field(90, ge=1, le=100)
    no_metadata: bool = False
    skip_save: bool = False
    skip_grid: bool = False
    n_rows: int = Field(0, ge=0, le=MAX_GRID_IMAGES)

    # How the job runs.
    strict: bool = False  # reject unknown columns of the manifest
    interpret_lines: bool = False  # in a .txt: skip comments, parse options after prompts
    device: Literal["auto", "cpu", "cuda"] = "auto"
    vram_budget: str | None = None
    turbo: bool = False
    unet_bs: int | None = Field(None, ge=1, le=2048)
    max_batch: int | None = Field(None, ge=1, le=1024)
    workers: int | None = Field(None, ge=1, le=1024)
    inline: bool = False
    address: Annotated[str, AfterValidator(check_address)] | None = None  # of a running Ray cluster
    worker_wait: float = Field(600.0, ge=0)  # seconds to wait for a worker on a cluster before the job fails

    # tiny-stable-diffusion's options: latent channels and downsampling factor. The model decides them.
    C: int | None = Field(None, ge=1)
    f: int | None = Field(None, ge=1)


class JobFile(Settings):
    """A `job.toml`: a manifest, its settings, and the presets on which they are based."""

    manifest: str
    output: str | None = None
    preset: list[str] = Field(default_factory=list)


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


def validate_settings(settings_type: type[Settings], values: dict[str, Any], source: str) -> Any:
    """Build a `settings_type` from `values`. Raises UsageError with the source, the settings and the broken rules."""
    try:
        return settings_type(**values)
    except ValidationError as validation_error:
        errors = "; ".join(
            f"{'.'.join(str(key) for key in error['loc'])} = {excerpt(error['input'])}: "
            f"{error['msg'].removeprefix('Value error, ')}"
            for error in validation_error.errors()
        )
        raise UsageError(f"{source}: {errors}") from None


def read_job_file(path: Path) -> tuple[dict[str, Any], Path, Path | None]:
    """Return the settings of a `job.toml` (its presets included), its manifest, and its output folder or None.

    Paths in the file are relative to its folder.
    """
    values = read_toml(path)
    job = validate_settings(JobFile, values, str(path))
    merged: dict[str, Any] = {}
    for preset in job.preset:
        merged |= drop_unset(read_preset(resolve_relative_path(path, preset)))
    merged |= drop_unset({key: values[key] for key in values.keys() - {"manifest", "output", "preset"}})
    if job.model != EMBEDDED_MODEL and "model" in values:
        merged["model"] = str(resolve_relative_path(path, job.model))
    output = resolve_relative_path(path, job.output) if job.output else None
    return merged, resolve_relative_path(path, job.manifest), output


def resolve_relative_path(file: Path, target: str) -> Path:
    """Return the path of `target`, which `file` names relative to its own folder."""
    if "\0" in target:
        raise UsageError(f"{file}: {excerpt(target)}: a path cannot contain NUL")
    return Path(os.path.normpath(file.parent / target))


def read_preset(path: Path) -> dict[str, Any]:
    """Read and check a preset. Raises UsageError."""
    values = read_toml(path)
    validate_settings(Settings, values, str(path))
    return values


def merge_settings(*layers: dict[str, Any]) -> Settings:
    """Merge layers of settings, of which later ones win. Unset values do not override. Raises UsageError."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= drop_unset(layer)
    settings: Settings = validate_settings(Settings, merged, "settings")
    parse_memory_budget(settings.vram_budget, MAX_SEED)
    return settings


def drop_unset(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if not is_unset(name, value)}


def is_unset(name: str, value: Any) -> bool:
    """Whether the value leaves the setting at that of an earlier layer."""
    is_number = name in INTEGER_SETTINGS or name in FLOAT_SETTINGS
    return value is None or (is_missing_number(value) if is_number else is_nan(value))


def parse_memory_budget(amount: str | float | None, total: int | None) -> int | None:
    """Return the bytes of a memory budget.

    Args:
        amount: Bytes, or text: `900MB`, `1.5 GiB`, a share of `total` such as `0.5`, or `-500MB` for all but that.
        total: The device's memory in bytes, None if it is unknown.

    Raises:
        UsageError: Any other text, or one that needs a `total`.
    """
    if amount is None or isinstance(amount, int):
        return amount
    match = re.fullmatch(r"\s*(-?)(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(amount).lower())
    if match is None or match[3] not in BYTE_UNITS or not float(match[2]):
        raise UsageError(
            f"vram_budget = {amount!r}: give a number with a unit, such as 900MB, a share of the device's memory, such "
            f"as 0.5, or an amount to leave free, such as -500MB"
        )
    number = float(match[2])
    is_share = not match[3] and number <= 1
    if total is None and (match[1] or is_share):
        raise UsageError(
            f"vram_budget = {amount!r}: the memory of a GPU on another machine is unknown; give an amount such as 900MB"
        )
    amount_bytes = min(number * (total if is_share and total else BYTE_UNITS[match[3]]), MAX_SEED)
    return int(total - amount_bytes if match[1] and total else amount_bytes)


def parse_bytes(amount: str | int | None, name: str) -> int | None:
    """Return the bytes of a number or of text such as `900MB` or `1.5 GiB`. Raises UsageError for anything else."""
    if amount is None or isinstance(amount, int):
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower())
    if match is None or match[2] not in BYTE_UNITS:
        raise UsageError(f"{name} = {amount!r}: give bytes or a number with a unit, such as 900MB")
    return int(min(float(match[1]) * BYTE_UNITS[match[2]], MAX_SEED))
