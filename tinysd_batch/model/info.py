"""What a job must know of a model before any of it is loaded: its size, defaults and digest. Imports no torch."""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tinysd_batch.errors import ModelError

SD_V1_STEPS = 50
SD_V1_SCALE = 7.5
SMALL_UNET_BYTES = 50_000_000
OUR_FILE = "tinysd.json"  # name and defaults; absent from folders that other tools made
WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = ("text_encoder", "unet", "vae", "scheduler", "tokenizer")
CONVERT_HINT = "a packed folder, as `tinysd_batch.quantize.fast.quantize_folder` writes it, is needed"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model folder as a job sees it."""

    path: Path
    name: str
    digest: str  # 32 hex digits over weights, configuration and tokenizer
    native_px: int
    channels: int  # of the latents
    factor: int  # pixels per latent, a side
    step_px: int  # height and width must be multiples of this
    steps: int
    scale: float
    max_tokens: int
    unet_bytes: int  # of the UNet's file

    @property
    def is_small(self) -> bool:
        """Too small for its tensors to be shared among processor cores."""
        return self.unet_bytes < SMALL_UNET_BYTES


def embedded_path() -> Path:
    """The model that ships inside the package."""
    return Path(str(files("tinysd_batch.embedded"))) / "model"


def resolve_path(model: str) -> Path:
    """The folder a `--model` value names; raise ModelError where there is no usable model."""
    path = embedded_path() if model == "embedded" else Path(model)
    if not path.exists():
        raise ModelError(f"{model}: no such model; give a model folder, or `embedded` for the one that ships with us")
    if path.is_file():
        raise ModelError(f"{model}: this is a single checkpoint file; {CONVERT_HINT}")
    missing = [part for part in PARTS if not (path / part).is_dir()]
    if missing:
        raise ModelError(f"{model}: not a model folder, it has no {', '.join(missing)}; {CONVERT_HINT}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the model folder is not complete") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{path}: an object was expected")
    return loaded


def model_digest(path: Path) -> str:
    """BLAKE2b over the files that decide pixels, each by its relative name and content."""
    digest = hashlib.blake2b(digest_size=16)
    for part in PARTS:
        for file in sorted((path / part).iterdir()):
            if file.suffix in (".safetensors", ".json", ".txt"):
                digest.update(f"{part}/{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
    return digest.hexdigest()


def read_model_info(model: str) -> ModelInfo:
    """Look at the model that `--model` names. Raises ModelError."""
    try:
        return look_at(resolve_path(model))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{model}: a config.json does not fit: {type(error).__name__}: {error}") from None


def look_at(path: Path) -> ModelInfo:
    unet = read_json(path / "unet" / "config.json")
    vae = read_json(path / "vae" / "config.json")
    text = read_json(path / "text_encoder" / "config.json")
    ours = read_json(path / OUR_FILE) if (path / OUR_FILE).exists() else {}
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return ModelInfo(
        path=path,
        name=str(ours.get("name", path.resolve().name)),
        digest=model_digest(path),
        native_px=unet["sample_size"] * factor,
        channels=unet["in_channels"],
        factor=factor,
        step_px=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        steps=int(ours.get("steps", SD_V1_STEPS)),
        scale=float(ours.get("scale", SD_V1_SCALE)),
        max_tokens=text["max_position_embeddings"],
        unet_bytes=(path / "unet" / WEIGHTS).stat().st_size if (path / "unet" / WEIGHTS).exists() else 0,
    )
