"""A job's settings: what may be set, in which bounds, and where each value comes from (preset < job.toml < flag)."""

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
SAMPLERS_WITH_ETA = ("plms", "ddim")  # the others have no use for it

MAX_STEPS = 1000  # SD v1 knows 1000 noise levels
MAX_SIDE_PX = 2048
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 10_000
MAX_IMAGES_PER_ROW = 100_000
MAX_GRID_IMAGES = 100
MAX_TOML_BYTES = 1_000_000
EMBEDDED_MODEL = "embedded"
BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


# What other programs call our samplers, as `squeeze` leaves it: k-diffusion, the web UI, ComfyUI, InvokeAI, and the
# scheduler classes of diffusers.
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
# Sigma schedules that such names end in.
SIGMA_SCHEDULES = {
    "karras": "Karras", "ka": "Karras", "polyexponential": "polyexponential", "exponential": "exponential",
    "sgmuniform": "SGM uniform", "ddimuniform": "DDIM uniform", "uniform": "uniform", "normal": "normal",
    "simple": "simple", "beta": "beta", "linearquadratic": "linear quadratic", "kloptimal": "KL optimal",
    "alignyoursteps": "align your steps", "ays": "align your steps", "automatic": "automatic", "turbo": "turbo",
}  # fmt: skip


def find_sampler(name: str) -> str:
    """A sampler's own name from what other programs call it, such as `Euler a`, `DPM++ 2M` or `k_dpm_2_ancestral`.

    Raises ValueError for a name that is none, and for one that asks for a sigma schedule, which is what is missing.
    """
    if own := look_up_sampler(normalize_sampler_name(name)):
        return own
    for own, schedule in split_off_schedules(name):
        raise ValueError(f"{own} is known, but its {schedule} schedule is missing; write {own} for the model's own")
    raise ValueError(f"no such sampler; one of {', '.join(SAMPLERS)}")


def normalize_sampler_name(name: str) -> str:
    """`k_dpm_2_ancestral` -> `kdpm2ancestral`, `diffusers.EulerDiscreteScheduler` -> `euler`"""
    plain = normalize_text(name).strip().rpartition(".")[2].lower().replace("++", "pp")
    plain = re.sub(r"[\W_]+", "", plain).removeprefix("sample").removesuffix("scheduler")
    return plain.replace("discrete", "")


def look_up_sampler(squeezed: str) -> str | None:
    """k-diffusion's samplers are known with a k before them, too."""
    return SAMPLER_ALIASES.get(squeezed) or SAMPLER_ALIASES.get(squeezed.removeprefix("k"))


def split_off_schedules(name: str) -> Iterator[tuple[str, str]]:
    """The samplers whose name, with a schedule behind it, this is, and the schedule."""
    squeezed = normalize_sampler_name(name)
    for ending, schedule in SIGMA_SCHEDULES.items():
        if squeezed.endswith(ending) and (own := look_up_sampler(squeezed.removesuffix(ending))):
            yield own, schedule
    # InvokeAI's dpmpp_2m_k
    if re.search(r"[\s_-]k$", name.strip().lower()) and (own := look_up_sampler(squeezed.removesuffix("k"))):
        yield own, "Karras"


INTEGER_SETTINGS = (
    "height", "width", "steps", "n_iter", "n_samples", "seed", "quality", "n_rows", "unet_bs", "max_batch", "workers",
    "C", "f",
)  # fmt: skip
FLOAT_SETTINGS = ("scale", "eta", "worker_wait")
TEXT_SETTINGS = (
    "negative_prompt", "prompt_syntax", "sampler", "rng", "precision", "format", "device", "vram_budget", "address",
)  # fmt: skip


def normalize_settings(values: Any) -> Any:
    """Settings as manifests' cells are read: `30.0` is 30, NaN and a seed of -1 say nothing, text is normalized."""
    if not isinstance(values, dict):
        return values
    tidied: dict[str, Any] = {}
    for name, value in values.items():
        if name in INTEGER_SETTINGS or name in FLOAT_SETTINGS:
            if is_missing_number(value) or (name == "seed" and value in (-1, "-1")):
                continue
            tidied[name] = to_integer_if_possible(value) if name in INTEGER_SETTINGS else value
        else:
            tidied[name] = normalize_text(value) if name in TEXT_SETTINGS and isinstance(value, str) else value
    return tidied


def to_integer_if_possible(value: Any) -> Any:
    """The value itself where it is none, for pydantic to say so."""
    try:
        return parse_integer(value)
    except ValueError:
        return value


def check_address(address: str) -> str:
    """Where a Ray cluster is, as `ray start` printed it; ValueError for what is no such place."""
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if address not in ("auto", "local") and not (host and is_port):
        raise ValueError("auto, local or HOST:PORT was expected, as `ray start` prints it")
    if "/" in host:
        raise ValueError("HOST:PORT was expected, without ray:// before it")
    return address


class Settings(BaseModel):
    """Everything a job can be told besides its rows. None means: the model's own default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    _tidy = model_validator(mode="before")(normalize_settings)

    # What decides the pixels of a row that does not say otherwise.
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

    # What becomes of the pictures.
    format: Literal["png", "jpg", "webp"] = "png"
    quality: int = Field(90, ge=1, le=100)
    no_metadata: bool = False
    skip_save: bool = False
    skip_grid: bool = False
    n_rows: int = Field(0, ge=0, le=MAX_GRID_IMAGES)

    # How the work is done.
    strict: bool = False  # refuse columns of the manifest that are not known
    interpret_lines: bool = False  # in a .txt: skip comments, read options behind prompts
    device: Literal["auto", "cpu", "cuda"] = "auto"
    vram_budget: str | None = None
    turbo: bool = False
    unet_bs: int | None = Field(None, ge=1, le=2048)
    max_batch: int | None = Field(None, ge=1, le=1024)
    workers: int | None = Field(None, ge=1, le=1024)
    inline: bool = False
    address: Annotated[str, AfterValidator(check_address)] | None = None  # of a Ray cluster
    worker_wait: float = Field(600.0, ge=0)  # seconds without any worker on a cluster, before the job gives up

    # The origin's, which only the model can answer.
    C: int | None = Field(None, ge=1)
    f: int | None = Field(None, ge=1)


class JobFile(Settings):
    """A `job.toml`: settings, the manifest they are for, and presets they start from."""

    manifest: str
    output: str | None = None
    preset: list[str] = Field(default_factory=list)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decode_text(read_file(path, MAX_TOML_BYTES)))
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except RecursionError:
        raise UsageError(f"{path}: not valid TOML: nested too deep") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None


def validate_settings(kind: type[Settings], values: dict[str, Any], where: str) -> Any:
    """Build `kind` from `values`, or raise UsageError naming `where`, the setting and the rule it breaks."""
    try:
        return kind(**values)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])} = {excerpt(fault['input'])}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise UsageError(f"{where}: {faults}") from None


def read_job_file(path: Path) -> tuple[dict[str, Any], Path, Path | None]:
    """The settings a `job.toml` gives (presets under it), its manifest, and its output folder if it names one.

    Paths in the file are relative to it.
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
    """A path that `file` names relative to itself."""
    if "\0" in target:
        raise UsageError(f"{file}: {excerpt(target)}: a path holds no NUL")
    return Path(os.path.normpath(file.parent / target))


def read_preset(path: Path) -> dict[str, Any]:
    values = read_toml(path)
    validate_settings(Settings, values, str(path))
    return values


def merge_settings(*layers: dict[str, Any]) -> Settings:
    """Settings from layers, later ones winning; a value of None in a layer says nothing."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= drop_unset(layer)
    settings: Settings = validate_settings(Settings, merged, "settings")
    parse_memory_budget(settings.vram_budget, MAX_SEED)
    return settings


def drop_unset(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if not is_unset(name, value)}


def is_unset(name: str, value: Any) -> bool:
    is_number = name in INTEGER_SETTINGS or name in FLOAT_SETTINGS
    return value is None or (is_missing_number(value) if is_number else is_nan(value))


def parse_memory_budget(amount: str | float | None, total: int | None) -> int | None:
    """Bytes from a number or text: `900MB`, `1.5 GiB`, `0.5` of the `total` bytes, or `-500MB`, all but so much.

    Raises UsageError for anything else, and where `total` would have to be known.
    """
    if amount is None or isinstance(amount, int):
        return amount
    match = re.fullmatch(r"\s*(-?)(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(amount).lower())
    if match is None or match[3] not in BYTE_UNITS or not float(match[2]):
        raise UsageError(
            f"vram_budget = {amount!r}: give a number with a unit, such as 900MB, a share of the device's memory, such "
            f"as 0.5, or what is to be left of it, such as -500MB"
        )
    number = float(match[2])
    is_share = not match[3] and number <= 1
    if total is None and (match[1] or is_share):
        raise UsageError(f"vram_budget = {amount!r}: the card is not here, so its memory is not known; give megabytes")
    wanted = min(number * (total if is_share and total else BYTE_UNITS[match[3]]), MAX_SEED)
    return int(total - wanted if match[1] and total else wanted)


def parse_bytes(amount: str | int | None, name: str) -> int | None:
    """Bytes from a number or text such as `900MB` or `1.5 GiB`; raise UsageError for anything else."""
    if amount is None or isinstance(amount, int):
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower())
    if match is None or match[2] not in BYTE_UNITS:
        raise UsageError(f"{name} = {amount!r}: give bytes or a number with a unit, such as 900MB")
    return int(min(float(match[1]) * BYTE_UNITS[match[2]], MAX_SEED))
