"""What the quantizer and the converter read: a float model as three components in diffusers' names.

Components (UNet, VAE, text encoder) are opened one at a time and memory-mapped, so that models larger than memory can
be converted.
"""

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

StatusCallback = Callable[[str], None]  # receives one line about what is being done


@dataclass(frozen=True, slots=True)
class SourceComponent:
    """A UNet, VAE or text encoder, with memory-mapped tensors under diffusers' names (text encoder: transformers')."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path  # named in error messages
    mapped_file: Mapping[str, Tensor] | None = None  # all tensors of the file, as opened

    def release(self) -> None:
        """Drop the pages of a safetensors file that were read from this process's memory. They can be read again."""
        if isinstance(self.mapped_file, MappedTensors):
            self.mapped_file.release()


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How to read a source."""

    allow_pickle: bool = False
    ema: bool = False  # use the EMA copies of the UNet's weights
    vae: Path | None = None  # read the VAE from this file or folder instead


@dataclass(slots=True)
class SourceReport:
    """What was ignored in a source, and notes for the user."""

    ignored: dict[str, int] = field(default_factory=dict)  # number of tensors or entries by category
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {category}" for category, count in sorted(self.ignored.items()))


class CheckpointSource(Protocol):
    """A model to convert or quantize. Each method opens and checks one component and raises ModelError."""

    name: str
    report: SourceReport

    def unet(self) -> SourceComponent: ...

    def vae(self) -> SourceComponent: ...

    def text_encoder(self) -> SourceComponent: ...

    def write_scheduler_and_tokenizer(self, folder: Path) -> None:
        """Write the scheduler's configuration, the tokenizer and `tinysd.json`."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Checks of configurations and tensors


def check_unet_tensors(component: SourceComponent) -> UNet2DConditionModel:
    """Check configuration and tensors, and return the empty UNet that they fit.

    Raises:
        ModelError: names the first entry or tensor that does not fit.
    """
    config_checks.check_unet_config(component.config, component.path)
    unet = build_empty_module(component, lambda: UNet2DConditionModel.from_config(component.config))
    check_tensors_fit(component, unet)
    return unet


def check_vae_tensors(component: SourceComponent) -> None:
    """Check configuration and tensors. Raises ModelError as `check_unet_tensors` does."""
    config_checks.check_vae_config(component.config, component.path)
    vae = build_empty_module(component, lambda: AutoencoderKL.from_config(component.config))
    if not has_encoder(component):
        vae.encoder = vae.quant_conv = None
    check_tensors_fit(component, vae)


def check_text_encoder_tensors(component: SourceComponent) -> None:
    """Check configuration and tensors. Raises ModelError as `check_unet_tensors` does."""
    config_checks.check_text_encoder_config(component.config, component.path)
    check_tensors_fit(
        component, build_empty_module(component, lambda: CLIPTextModel(CLIPTextConfig(**component.config)))
    )


def has_encoder(vae: SourceComponent) -> bool:
    """Whether a VAE can also encode; generating from text needs only its decoder."""
    return any(name.startswith("encoder.") for name in vae.tensors)


def build_empty_module(component: SourceComponent, construct: Callable[[], nn.Module]) -> Any:
    """Build a module on the meta device from the component's configuration. Raises ModelError if that fails."""
    with wrap_as_model_error(component.path, "its config.json does not fit"), META_DEVICE:
        return construct()


def check_tensors_fit(component: SourceComponent, module: nn.Module) -> None:
    """Raise ModelError unless the component has exactly the module's tensors: same names, same shapes, floats."""
    check_tensor_names(module, component.tensors, component.path)
    for name, expected in module.state_dict().items():
        tensor = component.tensors[name]
        if tensor.shape != expected.shape:
            raise ModelError(
                f"{component.path}: tensor {name} has shape {list(tensor.shape)}, {list(expected.shape)} was expected"
            )
        if not tensor.is_floating_point():
            raise ModelError(f"{component.path}: tensor {name} is {tensor.dtype}; floats were expected")


def choose_storage_dtype(dtype: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    """Return the dtype to write a tensor in: the requested one, else float16 for bfloat16 and float8.

    Float16 and float32 stay as they are; anything else becomes float32.
    """
    if requested is not None:
        return requested
    if dtype in LOW_PRECISION_DTYPES:
        return torch.float16
    return dtype if dtype == torch.float16 else torch.float32


def convert_for_storage(name: str, tensor: Tensor, requested: torch.dtype | None, path: Path) -> Tensor:
    """Return a contiguous tensor of the dtype to write it in.

    Raises:
        ModelError: the tensor is not finite, before or after the conversion.
    """
    converted = tensor.to(choose_storage_dtype(tensor.dtype, requested)).contiguous()
    if not converted.isfinite().all():
        if tensor.float().isfinite().all():
            raise ModelError(f"{path}: tensor {name} has numbers too large for float16; use --dtype fp32")
        raise ModelError(f"{path}: tensor {name} is not finite")
    return converted
