"""What each sort of layer harms alone: noise predictions with these layers packed and all others as floats."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinysd_batch.model.checkpoint.folder import read_layouts
from tinysd_batch.model.checkpoint.info import WEIGHTS
from tinysd_batch.model.checkpoint.json_file import read_json
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.packed.dequantize import unpack
from tinysd_batch.model.packed.format import Layout, from_matrix
from tinysd_batch.quantize.calibration.trajectories import Trajectories, points_among
from tinysd_batch.quantize.calibration.unet_segments import Walker, rows_at_once
from tinysd_batch.quantize.evaluate.compare import sqnr_db
from tinysd_batch.quantize.presets import sort_of
from tinysd_batch.quantize.sources.checkpoint_source import Part

EVERYTHING = "all of them together"


@dataclass(frozen=True, slots=True)
class Harm:
    """Of all layers of one sort, or of EVERYTHING."""

    sort: str
    noise_db: float  # SQNR of the guided noise prediction, with these layers packed only


@dataclass(frozen=True)
class Mixed(Mapping[str, Tensor]):
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
        return from_matrix(unpack(weight, torch.empty(weight.shape)), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.floats)

    def __len__(self) -> int:
        return len(self.floats)


def harms_of(part: Part, folder: Path, held: Trajectories, scale: float, device: torch.device) -> list[Harm]:
    """Each sort's, and everything's, worst first: `part` is the float UNet, `folder` the packed one's.

    Some points of the held-out trajectories go once through the UNet for each, with a unit's weights in memory.
    """
    packed = MappedTensors.read(folder / WEIGHTS)
    layouts = read_layouts(read_json(folder / "config.json"), packed, folder / WEIGHTS)
    chosen = {EVERYTHING: layouts}
    for name, layout in layouts.items():
        chosen.setdefault(sort_of(name), {})[name] = layout
    calls, prompts = points_of(held)
    latents, times = held.latents[calls, prompts].repeat(2, 1, 1, 1), held.times[calls].repeat(2)
    context = torch.cat([held.context_without[prompts], held.context[prompts]])
    without, with_text = held.noise_without[calls, prompts], held.noise[calls, prompts]
    wanted = without + scale * (with_text - without)
    harms = []
    for sort, some in chosen.items():
        walker = Walker(part.config, Mixed(part.tensors, packed, some), device, part.release)
        without, with_text = walker.predict(latents, times, context, rows_at_once(latents)).chunk(2)
        harms.append(Harm(sort, sqnr_db(wanted, without + scale * (with_text - without))))
        packed.release()
    return sorted(harms, key=lambda one: one.noise_db)


def points_of(held: Trajectories) -> tuple[Tensor, Tensor]:
    """Calls and prompts of the points, [N] each: as many as there is room for together, a prompt each, at all times."""
    steps, prompts = held.latents.shape[:2]
    points = torch.arange(points_among(prompts, rows_at_once(held.latents)))
    return (2 * points + 1) * steps // (2 * len(points)), points * prompts // len(points)
