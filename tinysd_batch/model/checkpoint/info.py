"""What a job must know of a model before any of it is loaded: its size, defaults and digest. Imports no torch."""

import hashlib
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tinysd_batch.config import MAX_SIDE_PX, MAX_STEPS
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import CONFIG_FILES, MAX_LEVELS, check_configs
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.text import excerpt, make_printable

SD_V1_STEPS = 50
SD_V1_SCALE = 7.5
SMALL_UNET_BYTES = 50_000_000
MODEL_DEFAULTS_FILE = "tinysd.json"  # name and defaults; absent from folders that other tools made
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MAX_NAME_CHARACTERS = 100
COMPONENT_FOLDERS = ("text_encoder", "unet", "vae", "scheduler", "tokenizer")
CONVERT_HINT = "make a model folder of it with `tinysd-batch quantize {0} OUT` (2 bits), or `convert` (float)"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model folder as a job sees it."""

    path: Path
    name: str
    digest: str  # 32 hex digits over weights, configuration and tokenizer
    native_px: int
    latent_channels: int  # of the latents
    vae_scale_factor: int  # pixels per latent, a side
    size_multiple_px: int  # height and width must be multiples of this
    steps: int
    scale: float
    max_tokens: int
    unet_bytes: int  # of the UNet's file

    @property
    def is_small(self) -> bool:
        """Too small for its tensors to be shared among processor cores."""
        return self.unet_bytes < SMALL_UNET_BYTES


def embedded_model_path() -> Path:
    """The model that ships inside the package."""
    return Path(str(files("tinysd_batch.embedded"))) / "model"


def resolve_model_path(model: str) -> Path:
    """The folder a `--model` value names; raise ModelError where there is no usable model."""
    path = embedded_model_path() if model == "embedded" else Path(model)
    try:
        is_there = path.exists()
    except OSError as error:
        raise ModelError(f"{model}: {(error.strerror or str(error)).lower()}") from None
    if not is_there:
        raise ModelError(
            f"{model}: no such model; give a model folder, or `embedded` for the one that ships with us "
            f"(README, Your own model, says where checkpoints come from and how to bring them in)"
        )
    if path.is_file():
        raise ModelError(f"{model}: this is a single checkpoint file; {CONVERT_HINT.format(model)}")
    missing = [part for part in COMPONENT_FOLDERS if not (path / part).is_dir()]
    if missing:
        raise ModelError(f"{model}: not a model folder, it has no {', '.join(missing)}")
    return path


def compute_model_digest(path: Path) -> str:
    """BLAKE2b over the files that decide pixels, each by its relative name and content."""
    digest = hashlib.blake2b(digest_size=16)
    for part in COMPONENT_FOLDERS:
        for file in sorted((path / part).iterdir()):
            if file.suffix in (".safetensors", ".json", ".txt") and file.is_file():
                digest.update(f"{part}/{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()


def read_model_info(model: str) -> ModelInfo:
    """Look at the model that `--model` names. Raises ModelError."""
    try:
        return read_folder_info(resolve_model_path(model))
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {(error.strerror or str(error)).lower()}") from None


def read_component_configs(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations of a model folder's parts. Raises ModelError for one that is missing or no JSON object."""
    return {part: read_json_object(path / part / name) for part, name in CONFIG_FILES.items()}


def read_folder_info(path: Path, digest: str | None = None) -> ModelInfo:
    """Check a model folder's configurations and say what a job must know. Without a `digest` it is computed."""
    check_configs(path, read_component_configs(path))
    defaults, sizes = read_model_defaults(path), read_model_sizes(path)
    return ModelInfo(
        path=path,
        name=defaults.name,
        digest=compute_model_digest(path) if digest is None else digest,
        native_px=sizes.native_px,
        latent_channels=sizes.latent_channels,
        vae_scale_factor=sizes.vae_scale_factor,
        size_multiple_px=sizes.size_multiple_px,
        steps=defaults.steps,
        scale=defaults.scale,
        max_tokens=sizes.max_tokens,
        unet_bytes=(path / "unet" / WEIGHTS_FILE).stat().st_size if (path / "unet" / WEIGHTS_FILE).exists() else 0,
    )


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model's configurations say of its images and prompts; see `ModelInfo`."""

    native_px: int
    latent_channels: int
    vae_scale_factor: int
    size_multiple_px: int
    max_tokens: int


def read_model_sizes(path: Path, *, own_vae: bool = True) -> ModelSizes:
    """Raises ModelError for values that are out of bounds. Without the folder's own VAE pixels are latents."""
    unet, text = path / "unet" / "config.json", path / "text_encoder" / "config.json"
    factor = 2 ** (count_resolution_levels(path / "vae" / "config.json") - 1) if own_vae else 1
    return ModelSizes(
        native_px=read_config_number(unet, "sample_size", 1, MAX_SIDE_PX // factor) * factor,
        latent_channels=read_config_number(unet, "in_channels", 1, 1024),
        vae_scale_factor=factor,
        size_multiple_px=factor * 2 ** (count_resolution_levels(unet) - 1),
        max_tokens=read_config_number(text, "max_position_embeddings", 3, 10_000),
    )


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What a model's folder says of itself in `tinysd.json`; SD v1's values where it does not."""

    name: str
    steps: int
    scale: float


def read_model_defaults(path: Path) -> ModelDefaults:
    """Raises ModelError for values that are out of bounds."""
    file = path / MODEL_DEFAULTS_FILE
    ours = read_json_object(file) if file.exists() else {}
    return ModelDefaults(
        name=make_printable(str(ours.get("name", path.resolve().name)))[:MAX_NAME_CHARACTERS],
        steps=read_config_number(file, "steps", 1, MAX_STEPS) if "steps" in ours else SD_V1_STEPS,
        scale=float(read_config_number(file, "scale", 0, 100, float)) if "scale" in ours else SD_V1_SCALE,
    )


def count_resolution_levels(config: Path) -> int:
    """How many sizes an image passes through, each half the one before."""
    found = read_json_object(config).get("block_out_channels")
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_LEVELS:
        raise ModelError(f"{config}: block_out_channels = {excerpt(found)}: a list of 1 to {MAX_LEVELS} was expected")
    return len(found)


def read_config_number(config: Path, name: str, least: int, most: int, kind: type[int] | type[float] = int) -> Any:
    """A number that the rest of the program relies upon. Raises ModelError."""
    value = read_json_object(config).get(name)
    if isinstance(value, bool) or not isinstance(value, int | kind) or not math.isfinite(value):
        raise ModelError(f"{config}: {name} = {excerpt(value)}: a number was expected")
    if not least <= value <= most:
        raise ModelError(f"{config}: {name} = {excerpt(value)}: must be between {least} and {most}")
    return value
