"""Read tiny-stable-diffusion's `full_int2_sd.pth`, whose UNet stays at 2 bits: no number changes.

The file has SD v1's layers under CompVis' names. 261 of them hold 2-bit codes: one byte for four consecutive output
channels, the first in the lowest bits. Four hold floats that stand for 8-bit codes, and 17 hold plain floats. Each
layer with codes has a `weight_quantizer.delta` and a `weight_quantizer.zero_point` per output channel:

    weight = (code - zero_point) * delta

All codes, zero points and deltas are kept; only the order of the codes in memory changes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.folder import META_DEVICE
from tinysd_batch.model.packed.format import PackedWeight, ZeroPointRowWeight, pack_codes, to_matrix
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent
from tinysd_batch.quantize.sources.detect import TINY_STABLE_DIFFUSION
from tinysd_batch.quantize.sources.ldm_names import UNET_PREFIX, check_tensor_count
from tinysd_batch.quantize.sources.single_file import SingleFileSource

# The wrapper that quantized tiny-stable-diffusion's UNet added `model.`; other files may lack it.
UNET_PREFIXES = (f"{UNET_PREFIX}model.", UNET_PREFIX)
DELTA_SUFFIX, ZERO_POINT_SUFFIX = "weight_quantizer.delta", "weight_quantizer.zero_point"
IGNORED_SUFFIXES = (".act_quantizer.delta", ".act_quantizer.zero_point", ".weight_quantizer.alpha")
CHANNEL_MULTIPLIERS = (1, 2, 4, 4)
LATENT_SIZE = 64  # SD v1's native size: 512 pixels


@dataclass(slots=True)
class TinyStableDiffusionUNet:
    """A UNet under diffusers' names, in the form that `write_packed_unet` takes."""

    config: dict[str, Any]
    packed: dict[str, tuple[PackedWeight, tuple[int, ...]]] = field(default_factory=dict)  # weight and float shape
    other_tensors: dict[str, Tensor] = field(default_factory=dict)


def is_tiny_stable_diffusion(names: Iterable[str]) -> bool:
    """Whether these are the tensor names of tiny-stable-diffusion's checkpoint."""
    return any(name.endswith(DELTA_SUFFIX) for name in names)


def read_tiny_stable_diffusion_unet(
    tensors: Mapping[str, Tensor], path: str, dtype: torch.dtype = torch.float32
) -> TinyStableDiffusionUNet:
    """Read the UNet from the checkpoint's tensors.

    Args:
        tensors: all tensors of the file.
        path: named in error messages.
        dtype: of the tensors that the file holds as plain floats.

    Raises:
        ModelError: names a tensor that is missing, unexpected, of the wrong shape, not finite, or not a code.
    """
    prefix = next((prefix for prefix in UNET_PREFIXES if f"{prefix}time_embed.0.weight" in tensors), None)
    if prefix is None:
        raise ModelError(f"{path}: no UNet: tensor {UNET_PREFIXES[0]}time_embed.0.weight is missing")
    unet_tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    reader = TensorReader(unet_tensors, path, prefix)
    with META_DEVICE:
        model = UNet2DConditionModel.from_config(build_unet_config(reader))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unet = TinyStableDiffusionUNet(dict(model.config))
    for name, ldm_name in map_to_ldm_names(unet_tensors, unet.config, path).items():
        shape = shapes.get(name)
        if shape is None:
            raise ModelError(f"{path}: tensor {prefix}{ldm_name} is unexpected")
        layer, _, leaf = ldm_name.rpartition(".")
        if leaf == "weight" and f"{layer}.{DELTA_SUFFIX}" in unet_tensors:
            unet.packed[name.removesuffix(".weight")] = reader.read_quantized_weight(layer, shape), shape
        else:
            unet.other_tensors[name] = reader.read_floats(ldm_name, shape).to(dtype)
    read_names = set(unet.other_tensors) | {f"{name}.weight" for name in unet.packed}
    if missing := sorted(set(shapes) - read_names):
        raise ModelError(
            f"{path}: {len(missing)} tensors of the UNet are missing; the first is, by diffusers' name, {missing[0]}"
        )
    reader.check_all_read()
    return unet


def build_unet_config(reader: "TensorReader") -> dict[str, Any]:
    """Build the configuration of SD v1's UNet with the widths of the checkpoint's tensors."""
    width = reader.get("time_embed.0.weight").shape[-1]
    context_width = reader.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight").shape[-1]
    return {
        "sample_size": LATENT_SIZE,
        "block_out_channels": [width * factor for factor in CHANNEL_MULTIPLIERS],
        "cross_attention_dim": context_width,
        "attention_head_dim": 8,
    }


def map_to_ldm_names(tensors: Mapping[str, Tensor], config: dict[str, Any], path: str) -> dict[str, str]:
    """Map diffusers' names of all weights and biases to the checkpoint's names.

    diffusers' converter only moves values from old to new names; here the values are the old names.
    """
    check_tensor_count(len(tensors), path)
    ldm_names = {UNET_PREFIX + name: name for name in tensors if name.endswith((".weight", ".bias"))}
    try:
        return dict(convert_ldm_unet_checkpoint(ldm_names, config))
    except KeyError as error:
        raise ModelError(f"{path}: tensor {error} of the UNet is missing") from None


class TensorReader:
    """Read and check tensors by the checkpoint's names, and remember which ones have not been read."""

    def __init__(self, tensors: Mapping[str, Tensor], path: str, prefix: str) -> None:
        self.tensors = tensors
        self.path = path
        self.prefix = prefix
        self.unread = {name for name in tensors if not name.endswith(IGNORED_SUFFIXES)}

    def make_error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: tensor {self.prefix}{name} {problem}")

    def get(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise self.make_error(name, "is missing")
        return self.tensors[name]

    def read_floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a finite tensor of this shape as float32."""
        tensor = self.get(name)
        if tuple(tensor.shape) != shape:
            raise self.make_error(name, f"has shape {list(tensor.shape)}, {list(shape)} was expected")
        self.unread.discard(name)
        floats = tensor.float()
        if not floats.isfinite().all():
            raise self.make_error(name, "is not finite")
        return floats

    def read_integers(self, name: str, shape: tuple[int, ...], maximum: int) -> Tensor:
        """Read integers from 0 to `maximum` as uint8; they may be stored in any dtype."""
        floats = self.read_floats(name, shape)
        if not torch.equal(floats, floats.round().clamp(0, maximum)):
            raise self.make_error(name, f"has values other than integers from 0 to {maximum}")
        return floats.to(torch.uint8)

    def read_quantized_weight(self, layer: str, shape: tuple[int, ...]) -> ZeroPointRowWeight:
        """Read a layer's weight [O, ...], which is stored at 2 or 8 bits."""
        rows = shape[0]
        stored_rows = self.get(f"{layer}.weight").shape[0]
        column_shape = (rows,) + (1,) * (len(shape) - 1)
        delta = self.read_floats(f"{layer}.{DELTA_SUFFIX}", column_shape)
        if stored_rows == rows:
            zero_point = self.read_integers(f"{layer}.{ZERO_POINT_SUFFIX}", column_shape, 255)
            codes = self.compute_8bit_codes(layer, shape, delta, zero_point)
            return ZeroPointRowWeight(codes, zero_point.flatten(), view_as_int32(delta), bits=8)
        zero_point = self.read_integers(f"{layer}.{ZERO_POINT_SUFFIX}", column_shape, 3)
        packed = self.read_integers(f"{layer}.weight", (rows // 4, *shape[1:]), 255)
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten(0, 1)
        return ZeroPointRowWeight(pack_codes(to_matrix(codes), 2), zero_point.flatten(), view_as_int32(delta))

    def compute_8bit_codes(self, layer: str, shape: tuple[int, ...], delta: Tensor, zero_point: Tensor) -> Tensor:
        """Compute the codes uint8 [O, K] that tiny-stable-diffusion derives from the stored floats at every use."""
        if not delta.all():
            raise self.make_error(f"{layer}.{DELTA_SUFFIX}", "is zero for some channels")
        codes = ((self.read_floats(f"{layer}.weight", shape) / delta).round() + zero_point.float()).clamp(0, 255)
        return to_matrix(codes).to(torch.uint8).contiguous()

    def check_all_read(self) -> None:
        """Raise ModelError naming the first tensor that was not read."""
        if self.unread:
            more = f", and {len(self.unread) - 1} more" if len(self.unread) > 1 else ""
            raise self.make_error(min(self.unread), f"is unexpected{more}")


def view_as_int32(delta: Tensor) -> Tensor:
    """Return the bits of float32 [O, 1, ...] as int32 [O]."""
    return delta.flatten().contiguous().view(torch.int32)


class TinyStableDiffusionSource(SingleFileSource):
    """tiny-stable-diffusion's `full_int2_sd.pth`: VAE and text encoder as in any SD v1 file, the UNet at 2 bits."""

    expected_type = TINY_STABLE_DIFFUSION

    def unet(self) -> SourceComponent:
        """Raise ModelError, because this UNet has no floats to quantize."""
        raise ModelError(f"{self.path}: the UNet is at 2 bits already")

    def read_packed_unet(self, dtype: torch.dtype | None) -> TinyStableDiffusionUNet:
        return read_tiny_stable_diffusion_unet(self.open_file().tensors, str(self.path), dtype or torch.float32)
