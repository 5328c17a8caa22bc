"""Read what a job needs of a model before loading it: sizes, defaults and digest. Does not import torch."""

import hashlib
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import CONFIG_FILES, MAX_LEVELS, check_configs
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.settings.limits import MAX_SIDE_PX, MAX_STEPS
from tinysd_batch.text import excerpt, make_printable

SD_V1_STEPS = 50
SD_V1_SCALE = 7.5
CLIP_LAYERS = 12  # where the configuration does not say
SMALL_UNET_BYTES = 50_000_000
MODEL_DEFAULTS_FILE = "tinysd.json"  # name and defaults; folders of other programs do not have it
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MAX_NAME_CHARACTERS = 100
COMPONENT_FOLDERS = ("text_encoder", "unet", "vae", "scheduler", "tokenizer")
CONVERT_HINT = "convert it to a model folder with `tinysd-batch quantize {0} OUT` (2 bits), or `convert` (float)"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Name, digest, sizes and defaults of a model folder."""

    path: Path
    name: str
    digest: str  # 32 hex digits over weights, configurations and tokenizer
    native_px: int  # height and width the model was trained for
    latent_channels: int
    vae_scale_factor: int  # pixels per latent, along each side
    size_multiple_px: int  # height and width must be multiples of this
    steps: int
    scale: float
    max_tokens: int  # of the text encoder, begin and end token included
    text_layers: int  # of the text encoder
    unet_bytes: int  # size of the UNet's file

    @property
    def is_small(self) -> bool:
        """Whether its tensors are too small to be worth splitting among CPU cores."""
        return self.unet_bytes < SMALL_UNET_BYTES


def embedded_model_path() -> Path:
    """Return the folder of the model inside the package."""
    return Path(str(files("tinysd_batch.embedded"))) / "model"


def resolve_model_path(model: str) -> Path:
    """Return the folder that a `--model` value names. Raises ModelError if it is not a model folder."""
    path = embedded_model_path() if model == "embedded" else Path(model)
    try:
        exists = path.exists()
    except OSError as error:
        raise ModelError(f"{model}: {(error.strerror or str(error)).lower()}") from None
    if not exists:
        raise ModelError(
            f"{model}: no such model; give a model folder, or `embedded` for the one inside the package "
            f"(README, Your own model, explains where to get checkpoints and how to convert them)"
        )
    if path.is_file():
        raise ModelError(f"{model}: this is a single checkpoint file; {CONVERT_HINT.format(model)}")
    missing = [component for component in COMPONENT_FOLDERS if not (path / component).is_dir()]
    if missing:
        raise ModelError(f"{model}: not a model folder, it has no {', '.join(missing)}")
    return path


def compute_model_digest(path: Path) -> str:
    """Return a BLAKE2b digest over name, size and content of all files that affect pixels."""
    digest = hashlib.blake2b(digest_size=16)
    for component in COMPONENT_FOLDERS:
        for file in sorted((path / component).iterdir()):
            if file.suffix in (".safetensors", ".json", ".txt") and file.is_file():
                digest.update(f"{component}/{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()


def read_model_info(model: str) -> ModelInfo:
    """Read the info of the model that a `--model` value names. Raises ModelError."""
    try:
        return read_folder_info(resolve_model_path(model))
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {(error.strerror or str(error)).lower()}") from None


def read_component_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Read the configuration of each component. Raises ModelError if one is missing or not a JSON object."""
    return {component: read_json_object(path / component / name) for component, name in CONFIG_FILES.items()}


def read_folder_info(path: Path, digest: str | None = None) -> ModelInfo:
    """Check a model folder's configurations and return its info. The digest is computed if it is not given."""
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
        text_layers=sizes.text_layers,
        unet_bytes=(path / "unet" / WEIGHTS_FILE).stat().st_size if (path / "unet" / WEIGHTS_FILE).exists() else 0,
    )


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes in a model's configurations; see `ModelInfo` for each."""

    native_px: int
    latent_channels: int
    vae_scale_factor: int
    size_multiple_px: int
    max_tokens: int
    text_layers: int


def read_model_sizes(path: Path, *, own_vae: bool = True) -> ModelSizes:
    """Read the sizes of a model folder. Raises ModelError for values that are out of bounds.

    Without `own_vae` the folder's VAE is not read and sizes are counted in latents.
    """
    unet, text = path / "unet" / "config.json", path / "text_encoder" / "config.json"
    factor = 2 ** (count_resolution_levels(path / "vae" / "config.json") - 1) if own_vae else 1
    return ModelSizes(
        native_px=read_config_number(unet, "sample_size", 1, MAX_SIDE_PX // factor) * factor,
        latent_channels=read_config_number(unet, "in_channels", 1, 1024),
        vae_scale_factor=factor,
        size_multiple_px=factor * 2 ** (count_resolution_levels(unet) - 1),
        max_tokens=read_config_number(text, "max_position_embeddings", 3, 10_000),
        text_layers=read_config_number(text, "num_hidden_layers", 1, 1000, default=CLIP_LAYERS),
    )


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """Name and defaults in a model folder's `tinysd.json`; SD v1's values for missing ones."""

    name: str
    steps: int
    scale: float


def read_model_defaults(path: Path) -> ModelDefaults:
    """Read a model folder's name and defaults. Raises ModelError for values that are out of bounds."""
    file = path / MODEL_DEFAULTS_FILE
    stored = read_json_object(file) if file.exists() else {}
    return ModelDefaults(
        name=make_printable(str(stored.get("name", path.resolve().name)))[:MAX_NAME_CHARACTERS],
        steps=read_config_number(file, "steps", 1, MAX_STEPS) if "steps" in stored else SD_V1_STEPS,
        scale=float(read_config_number(file, "scale", 0, 100, float)) if "scale" in stored else SD_V1_SCALE,
    )


def count_resolution_levels(config: Path) -> int:
    """Return the number of resolutions in a UNet or VAE, each half of the one before."""
    widths = read_json_object(config).get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= MAX_LEVELS:
        raise ModelError(f"{config}: block_out_channels = {excerpt(widths)}: a list of 1 to {MAX_LEVELS} was expected")
    return len(widths)


def read_config_number(
    config: Path,
    name: str,
    minimum: int,
    maximum: int,
    number_type: type[int] | type[float] = int,
    default: float | None = None,
) -> Any:
    """Read a number within bounds from a configuration file. Raises ModelError, also if it is missing."""
    value = read_json_object(config).get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | number_type) or not math.isfinite(value):
        raise ModelError(f"{config}: {name} = {excerpt(value)}: a number was expected")
    if not minimum <= value <= maximum:
        raise ModelError(f"{config}: {name} = {excerpt(value)}: must be between {minimum} and {maximum}")
    return value
