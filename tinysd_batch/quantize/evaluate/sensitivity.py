"""What each sort of layer harms alone: noise predictions with these layers packed and all others as floats."""

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

ALL_LAYERS = "all of them together"


@dataclass(frozen=True, slots=True)
class LayerTypeSensitivity:
    """Of all layers of one sort, or of ALL_LAYERS."""

    layer_type: str
    noise_sqnr_db: float  # SQNR of the guided noise prediction, with these layers packed only


@dataclass(frozen=True)
class PartiallyPackedTensors(Mapping[str, Tensor]):
    """A float UNet's tensors, with those of some packed layers in place of their own, unpacked when asked for."""

    floats: Mapping[str, Tensor]
    packed: Mapping[str, Tensor]  # of the packed file
    layouts: Mapping[str, Layout]  # of the layers that are packed

    def __getitem__(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if layer not in self.layouts:
            return self.floats[name]
        if leaf == "bias":
            return self.packed[name]
        layout, shape = self.layouts[layer], self.floats[name].shape
        parts = layout.tensors(shape[0], shape[1:].numel())
        weight = layout.weight({part: self.packed[f"{layer}.{part}"] for part in parts})
        return from_matrix(dequantize(weight, torch.empty(weight.shape)), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.floats)

    def __len__(self) -> int:
        return len(self.floats)


def measure_sensitivity(
    part: SourceComponent, folder: Path, held: Trajectories, scale: float, device: torch.device
) -> list[LayerTypeSensitivity]:
    """Each sort's, and everything's, worst first: `part` is the float UNet, `folder` the packed one's.

    Some points of the held-out trajectories go once through the UNet for each, with a unit's weights in memory.
    """
    packed = MappedTensors.read(folder / WEIGHTS_FILE)
    layouts = read_layouts(read_json_object(folder / "config.json"), packed, folder / WEIGHTS_FILE)
    chosen = {ALL_LAYERS: layouts}
    for name, layout in layouts.items():
        chosen.setdefault(get_layer_type(name), {})[name] = layout
    calls, prompts = select_sensitivity_points(held)
    latents, times = held.latents[calls, prompts].repeat(2, 1, 1, 1), held.times[calls].repeat(2)
    context = torch.cat([held.context_without[prompts], held.context[prompts]])
    without, with_text = held.noise_without[calls, prompts], held.noise[calls, prompts]
    wanted = without + scale * (with_text - without)
    harms = []
    for sort, some in chosen.items():
        walker = SegmentedUNet(part.config, PartiallyPackedTensors(part.tensors, packed, some), device, part.release)
        without, with_text = walker.predict(latents, times, context, segment_batch_size(latents)).chunk(2)
        harms.append(LayerTypeSensitivity(sort, compute_sqnr_db(wanted, without + scale * (with_text - without))))
        packed.release()
    return sorted(harms, key=lambda one: one.noise_sqnr_db)


def select_sensitivity_points(held: Trajectories) -> tuple[Tensor, Tensor]:
    """Calls and prompts of the points, [N] each: as many as there is room for together, a prompt each, at all times."""
    steps, prompts = held.latents.shape[:2]
    points = torch.arange(count_sensitivity_points(prompts, segment_batch_size(held.latents)))
    return (2 * points + 1) * steps // (2 * len(points)), points * prompts // len(points)
