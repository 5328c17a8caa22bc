"""The UNet of the origin's `full_int2_sd.pth`, taken over without changing a number.

The file names SD v1's layers as CompVis does. 261 of them hold 2-bit codes, a byte for four output channels in a row,
the first in the lowest bits; four hold floats that stand for 8-bit codes; 17 hold plain floats. Each layer of codes has
a `weight_quantizer.delta` and `weight_quantizer.zero_point` per output channel:

    weight = (code - zero_point) * delta

Here every code, zero and delta is kept; only the order of the codes changes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
)
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.folder import META_DEVICE
from tinysd_batch.model.packed.format import PackedWeight, ZeroPointRowWeight, pack_codes, to_matrix
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
)
from tinysd_batch.quantize.sources.detect import TINY_STABLE_DIFFUSION
from tinysd_batch.quantize.sources.ldm_names import check_tensor_count
from tinysd_batch.quantize.sources.single_file import SingleFileSource

LDM_PREFIX = "model.diffusion_model."
UNET_PREFIXES = (
    "model.diffusion_model.model.",
    LDM_PREFIX,
)  # the first is the origin's, from the wrapper that quantized it
DELTA_SUFFIX, ZERO_POINT_SUFFIX = "weight_quantizer.delta", "weight_quantizer.zero_point"
IGNORED_SUFFIXES = (".act_quantizer.delta", ".act_quantizer.zero_point", ".weight_quantizer.alpha")
CHANNEL_MULTIPLIERS = (1, 2, 4, 4)
LATENT_SIZE = 64  # SD v1's own size, 512 pixels


@dataclass(slots=True)
class TinyStableDiffusionUNet:
    """A UNet under diffusers' names, as `write_packed_unet` takes it."""

    config: dict[str, Any]
    packed: dict[str, tuple[PackedWeight, tuple[int, ...]]] = field(default_factory=dict)
    other_tensors: dict[str, Tensor] = field(default_factory=dict)


def is_tiny_stable_diffusion(names: Iterable[str]) -> bool:
    """Whether these are the names of the origin's checkpoint."""
    return any(name.endswith(DELTA_SUFFIX) for name in names)


def read_tiny_stable_diffusion_unet(
    tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype = torch.float32
) -> TinyStableDiffusionUNet:
    """The UNet out of the checkpoint's tensors. What the origin keeps as floats becomes `dtype`.

    Raises ModelError naming a tensor that is missing, unexpected, of the wrong shape, not finite, or no code.
    """
    prefix = next((one for one in UNET_PREFIXES if f"{one}time_embed.0.weight" in tensors), None)
    if prefix is None:
        raise ModelError(f"{where}: no UNet: tensor {UNET_PREFIXES[0]}time_embed.0.weight is missing")
    mine = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    reader = TensorReader(mine, where, prefix)
    with META_DEVICE:
        model = UNet2DConditionModel.from_config(build_unet_config(reader))
    places = model.state_dict()
    unet = TinyStableDiffusionUNet(dict(model.config))
    for name, source in map_to_ldm_names(mine, unet.config, where).items():
        place = places.get(name)
        if place is None:
            raise ModelError(f"{where}: tensor {prefix}{source} is unexpected")
        layer, _, leaf = source.rpartition(".")
        if leaf == "weight" and f"{layer}.{DELTA_SUFFIX}" in mine:
            unet.packed[name.removesuffix(".weight")] = (
                reader.read_quantized_weight(layer, tuple(place.shape)),
                tuple(place.shape),
            )
        else:
            unet.other_tensors[name] = reader.read_floats(source, tuple(place.shape)).to(dtype)
    made = set(unet.other_tensors) | {f"{name}.weight" for name in unet.packed}
    if missing := sorted(set(places) - made):
        raise ModelError(f"{where}: {len(missing)} tensors of the UNet are missing; the first is, by diffusers' name, "
                         f"{missing[0]}")  # fmt: skip
    reader.check_all_read()
    return unet


def build_unet_config(reader: "TensorReader") -> dict[str, Any]:
    """SD v1's UNet, as wide as the tensors are."""
    width = reader.get("time_embed.0.weight").shape[-1]
    context = reader.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight").shape[-1]
    return {
        "sample_size": LATENT_SIZE,
        "block_out_channels": [width * factor for factor in CHANNEL_MULTIPLIERS],
        "cross_attention_dim": context,
        "attention_head_dim": 8,
    }


def map_to_ldm_names(tensors: Mapping[str, Tensor], config: dict[str, Any], where: str) -> dict[str, str]:
    """diffusers' names -> the checkpoint's, of weights and biases. diffusers renames whatever hangs on the names."""
    check_tensor_count(len(tensors), where)
    sources = {LDM_PREFIX + name: name for name in tensors if name.endswith((".weight", ".bias"))}
    try:
        return dict(convert_ldm_unet_checkpoint(sources, config))
    except KeyError as error:
        raise ModelError(f"{where}: tensor {error} of the UNet is missing") from None


class TensorReader:
    """Takes tensors by the checkpoint's names, and knows what is left."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str, prefix: str) -> None:
        self.tensors = tensors
        self.where = where
        self.prefix = prefix
        self.unread = {name for name in tensors if not name.endswith(IGNORED_SUFFIXES)}

    def make_error(self, name: str, fault: str) -> ModelError:
        return ModelError(f"{self.where}: tensor {self.prefix}{name} {fault}")

    def get(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise self.make_error(name, "is missing")
        return self.tensors[name]

    def read_floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of numbers, float32."""
        tensor = self.get(name)
        if tuple(tensor.shape) != shape:
            raise self.make_error(name, f"has shape {list(tensor.shape)}, {list(shape)} was expected")
        self.unread.discard(name)
        numbers = tensor.float()
        if not numbers.isfinite().all():
            raise self.make_error(name, "is not finite")
        return numbers

    def read_integers(self, name: str, shape: tuple[int, ...], most: int) -> Tensor:
        """Whole numbers 0 to `most`, as uint8, whatever type they are stored in."""
        numbers = self.read_floats(name, shape)
        if not torch.equal(numbers, numbers.round().clamp(0, most)):
            raise self.make_error(name, f"holds other numbers than 0 to {most}")
        return numbers.to(torch.uint8)

    def read_quantized_weight(self, layer: str, shape: tuple[int, ...]) -> ZeroPointRowWeight:
        """A layer's weight [O, ...] as it is stored, at 2 or 8 bits."""
        rows = shape[0]
        stored = self.get(f"{layer}.weight").shape[0]
        column = (rows,) + (1,) * (len(shape) - 1)
        delta = self.read_floats(f"{layer}.{DELTA_SUFFIX}", column)
        if stored == rows:
            zero = self.read_integers(f"{layer}.{ZERO_POINT_SUFFIX}", column, 255)
            codes = self.compute_8bit_codes(layer, shape, delta, zero)
            return ZeroPointRowWeight(codes, zero.flatten(), view_as_int32(delta), bits=8)
        zero = self.read_integers(f"{layer}.{ZERO_POINT_SUFFIX}", column, 3)
        packed = self.read_integers(f"{layer}.weight", (rows // 4, *shape[1:]), 255)
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten(0, 1)
        return ZeroPointRowWeight(pack_codes(to_matrix(codes), 2), zero.flatten(), view_as_int32(delta))

    def compute_8bit_codes(self, layer: str, shape: tuple[int, ...], delta: Tensor, zero: Tensor) -> Tensor:
        """What the origin computes of the stored floats at every use, uint8 [O, K]."""
        if not delta.all():
            raise self.make_error(f"{layer}.{DELTA_SUFFIX}", "is zero somewhere")
        codes = ((self.read_floats(f"{layer}.weight", shape) / delta).round() + zero.float()).clamp(0, 255)
        return to_matrix(codes).to(torch.uint8).contiguous()

    def check_all_read(self) -> None:
        if self.unread:
            first = min(self.unread)
            raise self.make_error(
                first, f"is unexpected, and {len(self.unread) - 1} more" if len(self.unread) > 1 else "is unexpected"
            )


def view_as_int32(delta: Tensor) -> Tensor:
    """float32 [O, 1, ...] as the int32 [O] of its bits."""
    return delta.flatten().contiguous().view(torch.int32)


class TinyStableDiffusionSource(SingleFileSource):
    """The origin's `full_int2_sd.pth`: autoencoder and text encoder as in any file of SD v1, the UNet at 2 bits."""

    expected_type = TINY_STABLE_DIFFUSION

    def unet(self) -> SourceComponent:
        """Raises ModelError always: these are no floats."""
        raise ModelError(f"{self.path}: the UNet is at 2 bits already")

    def read_packed_unet(self, dtype: torch.dtype | None) -> TinyStableDiffusionUNet:
        return read_tiny_stable_diffusion_unet(self.open_file().tensors, str(self.path), dtype or torch.float32)
