"""A float model as quantizer and converter take it: three parts in diffusers' names, opened one at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint import config_checks
from tinysd_batch.model.checkpoint.folder import KEEP_ON_META, building_from, check_names
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors

SMALL_FLOATS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """UNet, autoencoder or text encoder. Tensors are memory-mapped; names are diffusers' (text: transformers')."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    where: Path
    file: Mapping[str, Tensor] | None = None  # as it was opened

    def release(self) -> None:
        """Take what has been read of a safetensors file out of this process's memory. It can be read again."""
        if isinstance(self.file, MappedTensors):
            self.file.release()


@dataclass(frozen=True, slots=True)
class Options:
    """How a source is to be read."""

    allow_pickle: bool = False
    ema: bool = False  # take the averaged copies of the UNet
    vae: Path | None = None  # take the autoencoder from there


@dataclass(slots=True)
class Found:
    """What was left out of a source, and how much of it; and what else is worth knowing of it."""

    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.left_out.items()))


class Source(Protocol):
    """A model to be converted or quantized. Each part is opened when it is asked for, and raises ModelError."""

    name: str
    found: Found

    def unet(self) -> Part: ...

    def vae(self) -> Part: ...

    def text_encoder(self) -> Part: ...

    def write_rest(self, folder: Path) -> None:
        """Write scheduler, tokenizer and `tinysd.json`."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# What the tensors must be


def check_unet(part: Part) -> UNet2DConditionModel:
    """The empty UNet that the tensors fit; raise ModelError naming one that does not."""
    config_checks.check_unet(part.config, part.where)
    unet = build(part, lambda: UNet2DConditionModel.from_config(part.config))
    check_tensors(part, unet)
    return unet


def check_vae(part: Part) -> None:
    config_checks.check_vae(part.config, part.where)
    vae = build(part, lambda: AutoencoderKL.from_config(part.config))
    if not has_encoder(part):
        vae.encoder = vae.quant_conv = None
    check_tensors(part, vae)


def check_text_encoder(part: Part) -> None:
    config_checks.check_text_encoder(part.config, part.where)
    check_tensors(part, build(part, lambda: CLIPTextModel(CLIPTextConfig(**part.config))))


def has_encoder(part: Part) -> bool:
    """Whether an autoencoder can also encode, which drawing from text never needs."""
    return any(name.startswith("encoder.") for name in part.tensors)


def build(part: Part, make: Callable[[], nn.Module]) -> Any:
    """An empty module by the part's configuration. Raises ModelError."""
    with building_from(part.where, "its config.json does not fit"), KEEP_ON_META:
        return make()


def check_tensors(part: Part, module: nn.Module) -> None:
    """Raise ModelError unless these are the module's tensors, by name, shape and being floats."""
    check_names(module, part.tensors, part.where)
    for name, expected in module.state_dict().items():
        tensor = part.tensors[name]
        if tensor.shape != expected.shape:
            raise ModelError(
                f"{part.where}: tensor {name} has shape {list(tensor.shape)}, {list(expected.shape)} was expected"
            )
        if not tensor.is_floating_point():
            raise ModelError(f"{part.where}: tensor {name} is {tensor.dtype}; floats were expected")


def stored_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """In which type to write what is stored in another: float16 and float32 stay, smaller types become float16."""
    if wanted is not None:
        return wanted
    if stored in SMALL_FLOATS:
        return torch.float16
    return stored if stored == torch.float16 else torch.float32


def as_stored(name: str, tensor: Tensor, wanted: torch.dtype | None, where: Path) -> Tensor:
    """A tensor in the type it is written in, contiguous; raise ModelError where it is not finite, then or now."""
    value = tensor.to(stored_dtype(tensor.dtype, wanted)).contiguous()
    if not value.isfinite().all():
        if tensor.float().isfinite().all():
            raise ModelError(f"{where}: tensor {name} has numbers too large for float16; say --dtype fp32")
        raise ModelError(f"{where}: tensor {name} is not finite")
    return value
