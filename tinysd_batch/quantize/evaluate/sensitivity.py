"""Measure sensitivity by layer type: how far the UNet is off with the layers of one type packed, all others float."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinysd_batch.model.checkpoint.folder import read_layouts
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import Layout, from_matrix
from tinysd_batch.quantize.calibration.trajectories import Trajectories, count_sensitivity_points
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet, segment_batch_size
from tinysd_batch.quantize.evaluate.compare import compute_sqnr_db
from tinysd_batch.quantize.presets import get_layer_type
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent

ALL_LAYERS = "all of them together"  # stored in reports


@dataclass(frozen=True, slots=True)
class LayerTypeSensitivity:
    """The error caused by all layers of one type, or by ALL_LAYERS."""

    layer_type: str
    noise_sqnr_db: float  # of the guided noise prediction with only these layers packed


@dataclass(frozen=True)
class PartiallyPackedTensors(Mapping[str, Tensor]):
    """A float UNet's tensors with some layers replaced by their packed versions, dequantized on access."""

    float_tensors: Mapping[str, Tensor]
    packed_tensors: Mapping[str, Tensor]  # of the packed UNet's file
    layouts: Mapping[str, Layout]  # of the layers to replace

    def __getitem__(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if layer not in self.layouts:
            return self.float_tensors[name]
        if leaf == "bias":
            return self.packed_tensors[name]
        layout, shape = self.layouts[layer], self.float_tensors[name].shape
        tensor_names = layout.tensors(shape[0], shape[1:].numel())
        weight = layout.weight({part: self.packed_tensors[f"{layer}.{part}"] for part in tensor_names})
        return from_matrix(dequantize(weight, torch.empty(weight.shape)), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.float_tensors)

    def __len__(self) -> int:
        return len(self.float_tensors)


def measure_sensitivity(
    float_unet: SourceComponent, packed_folder: Path, held_out: Trajectories, scale: float, device: torch.device
) -> list[LayerTypeSensitivity]:
    """Measure the sensitivity to each layer type and to all of them together.

    For each, some points of the held-out trajectories go once through the UNet, with the weights of one segment in
    memory at a time.

    Args:
        float_unet: the float model's UNet.
        packed_folder: the packed UNet's folder.
        held_out: trajectories of the float model.
        scale: guidance scale of the trajectories.
        device: where the UNet runs.

    Returns:
        The largest error first.
    """
    packed = MappedTensors.read(packed_folder / WEIGHTS_FILE)
    layouts = read_layouts(read_json_object(packed_folder / "config.json"), packed, packed_folder / WEIGHTS_FILE)
    layouts_by_type = {ALL_LAYERS: layouts}
    for name, layout in layouts.items():
        layouts_by_type.setdefault(get_layer_type(name), {})[name] = layout
    steps, prompts = select_sensitivity_points(held_out)
    latents, times = held_out.latents[steps, prompts].repeat(2, 1, 1, 1), held_out.times[steps].repeat(2)
    context = torch.cat([held_out.context_without[prompts], held_out.context[prompts]])
    noise_uncond, noise_text = held_out.noise_without[steps, prompts], held_out.noise[steps, prompts]
    float_noise = noise_uncond + scale * (noise_text - noise_uncond)
    sensitivities = []
    for layer_type, layouts_of_type in layouts_by_type.items():
        tensors = PartiallyPackedTensors(float_unet.tensors, packed, layouts_of_type)
        unet = SegmentedUNet(float_unet.config, tensors, device, float_unet.release)
        noise_uncond, noise_text = unet.predict(latents, times, context, segment_batch_size(latents)).chunk(2)
        sqnr_db = compute_sqnr_db(float_noise, noise_uncond + scale * (noise_text - noise_uncond))
        sensitivities.append(LayerTypeSensitivity(layer_type, sqnr_db))
        packed.release()
    return sorted(sensitivities, key=lambda sensitivity: sensitivity.noise_sqnr_db)


def select_sensitivity_points(held_out: Trajectories) -> tuple[Tensor, Tensor]:
    """Select points spread over all timesteps, each of another prompt, as many as fit one batch of a segment.

    Returns:
        Step and prompt indexes of the points, [N] each.
    """
    steps, prompts = held_out.latents.shape[:2]
    points = torch.arange(count_sensitivity_points(prompts, segment_batch_size(held_out.latents)))
    return (2 * points + 1) * steps // (2 * len(points)), points * prompts // len(points)
