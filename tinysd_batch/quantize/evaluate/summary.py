"""What a packed UNet consists of: each layer's sort, bits and bytes."""

import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysd_batch.model.checkpoint.info import WEIGHTS, read_model_info
from tinysd_batch.model.checkpoint.json_file import read_json
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.evaluate.fit_noise_correction import Judged
from tinysd_batch.quantize.presets import Size, sort_of
from tinysd_batch.quantize.recipe import Recipe

FLOATS = "norms and biases"


@dataclass(frozen=True, slots=True)
class Made:
    """What quantizing knows of the model that it has written."""

    layers: dict[str, float]  # SQNR in dB: of a layer's output on held-out rows, at level fast of its weights
    held_out: Trajectories | None  # of the float model; None where nothing was drawn
    seconds: float
    judged: Judged | None = None  # what became of the noise correction; None where it was not measured


@dataclass(frozen=True, slots=True)
class LayerFound:
    """A layer's weight."""

    name: str
    kind: str
    weights: int
    bytes: int
    bits: int
    sqnr_db: float | None  # as in `Made`; None where it was not packed


@dataclass(slots=True)
class ClassFound:
    """All layers of one sort."""

    name: str
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class Summary:
    """A packed model, and what making it took."""

    name: str
    level: str
    size: str  # asked for
    layers: list[LayerFound]
    classes: list[ClassFound]
    unet_bytes: int
    seconds: float
    peak_memory_bytes: int
    device: str
    recipe: dict[str, Any] | None  # None where nothing was drawn
    judged: Judged | None  # the noise correction, kept or not; None where it was not measured


def read_layers(unet: Path, sqnr_db: Mapping[str, float]) -> list[LayerFound]:
    """Every weight of a packed UNet's folder; norms and biases together as one."""
    entries = read_json(unet / "config.json")["quantization_config"]["layers"]
    counts: dict[str, int] = {name: math.prod(entry["shape"]) for name, entry in entries.items()}
    sizes: dict[str, int] = {}
    for name, tensor in MappedTensors.read(unet / WEIGHTS).items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias" or (tensor.dim() < 2 and layer not in entries):
            layer = FLOATS
        if layer not in entries:
            counts[layer] = counts.get(layer, 0) + tensor.numel()
        sizes[layer] = sizes.get(layer, 0) + tensor.numel() * tensor.element_size()
    return [
        LayerFound(
            name, FLOATS if name == FLOATS else sort_of(name), counts[name], size,
            entries[name]["bits"] if name in entries else 16, sqnr_db.get(name),
        )
        for name, size in sizes.items()
    ]  # fmt: skip


def classes_of(layers: list[LayerFound]) -> list[ClassFound]:
    """Largest first."""
    found: dict[str, ClassFound] = {}
    for layer in layers:
        each = found.setdefault(layer.kind, ClassFound(layer.kind))
        each.weights += layer.weights
        each.bytes += layer.bytes
    return sorted(found.values(), key=lambda each: -each.bytes)


def summarize(out: Path, made: Made, device: str, recipe: Recipe | None) -> Summary:
    """Of the packed model in `out`, which this process has just made."""
    layers = read_layers(out / "unet", made.layers)
    config = read_json(out / "unet" / "config.json")["quantization_config"]
    return Summary(
        name=read_model_info(str(out)).name,
        level=config["level"],
        size=str(Size(config["preset"], config.get("target_size"))),
        layers=layers,
        classes=classes_of(layers),
        unet_bytes=(out / "unet" / WEIGHTS).stat().st_size,
        seconds=made.seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=device,
        recipe=None
        if recipe is None
        else {**recipe.model_dump(exclude={"prompts", "held_out"}), "prompts": len(recipe.prompts)},
        judged=made.judged,
    )
