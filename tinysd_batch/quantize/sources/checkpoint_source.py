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
from tinysd_batch.model.checkpoint.folder import META_DEVICE, check_tensor_names, wrap_as_model_error
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors

LOW_PRECISION_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

StatusCallback = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SourceComponent:
    """UNet, autoencoder or text encoder. Tensors are memory-mapped; names are diffusers' (text: transformers')."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path
    mapped_file: Mapping[str, Tensor] | None = None  # as it was opened

    def release(self) -> None:
        """Take what has been read of a safetensors file out of this process's memory. It can be read again."""
        if isinstance(self.mapped_file, MappedTensors):
            self.mapped_file.release()


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source is to be read."""

    allow_pickle: bool = False
    ema: bool = False  # take the averaged copies of the UNet
    vae: Path | None = None  # take the autoencoder from there


@dataclass(slots=True)
class SourceReport:
    """What was left out of a source, and how much of it; and what else is worth knowing of it."""

    ignored: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.ignored.items()))


class CheckpointSource(Protocol):
    """A model to be converted or quantized. Each part is opened when it is asked for, and raises ModelError."""

    name: str
    report: SourceReport

    def unet(self) -> SourceComponent: ...

    def vae(self) -> SourceComponent: ...

    def text_encoder(self) -> SourceComponent: ...

    def write_scheduler_and_tokenizer(self, folder: Path) -> None:
        """Write scheduler, tokenizer and `tinysd.json`."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# What the tensors must be


def check_unet_tensors(part: SourceComponent) -> UNet2DConditionModel:
    """The empty UNet that the tensors fit; raise ModelError naming one that does not."""
    config_checks.check_unet_config(part.config, part.path)
    unet = build_empty_module(part, lambda: UNet2DConditionModel.from_config(part.config))
    check_tensors_fit(part, unet)
    return unet


def check_vae_tensors(part: SourceComponent) -> None:
    config_checks.check_vae_config(part.config, part.path)
    vae = build_empty_module(part, lambda: AutoencoderKL.from_config(part.config))
    if not has_encoder(part):
        vae.encoder = vae.quant_conv = None
    check_tensors_fit(part, vae)


def check_text_encoder_tensors(part: SourceComponent) -> None:
    config_checks.check_text_encoder_config(part.config, part.path)
    check_tensors_fit(part, build_empty_module(part, lambda: CLIPTextModel(CLIPTextConfig(**part.config))))


def has_encoder(part: SourceComponent) -> bool:
    """Whether an autoencoder can also encode, which drawing from text never needs."""
    return any(name.startswith("encoder.") for name in part.tensors)


def build_empty_module(part: SourceComponent, make: Callable[[], nn.Module]) -> Any:
    """An empty module by the part's configuration. Raises ModelError."""
    with wrap_as_model_error(part.path, "its config.json does not fit"), META_DEVICE:
        return make()


def check_tensors_fit(part: SourceComponent, module: nn.Module) -> None:
    """Raise ModelError unless these are the module's tensors, by name, shape and being floats."""
    check_tensor_names(module, part.tensors, part.path)
    for name, expected in module.state_dict().items():
        tensor = part.tensors[name]
        if tensor.shape != expected.shape:
            raise ModelError(
                f"{part.path}: tensor {name} has shape {list(tensor.shape)}, {list(expected.shape)} was expected"
            )
        if not tensor.is_floating_point():
            raise ModelError(f"{part.path}: tensor {name} is {tensor.dtype}; floats were expected")


def choose_storage_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """In which type to write what is stored in another: float16 and float32 stay, smaller types become float16."""
    if wanted is not None:
        return wanted
    if stored in LOW_PRECISION_DTYPES:
        return torch.float16
    return stored if stored == torch.float16 else torch.float32


def convert_for_storage(name: str, tensor: Tensor, wanted: torch.dtype | None, where: Path) -> Tensor:
    """A tensor in the type it is written in, contiguous; raise ModelError where it is not finite, then or now."""
    value = tensor.to(choose_storage_dtype(tensor.dtype, wanted)).contiguous()
    if not value.isfinite().all():
        if tensor.float().isfinite().all():
            raise ModelError(f"{where}: tensor {name} has numbers too large for float16; say --dtype fp32")
        raise ModelError(f"{where}: tensor {name} is not finite")
    return value
