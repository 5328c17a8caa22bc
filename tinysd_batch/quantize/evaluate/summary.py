"""What a packed UNet consists of: each layer's sort, bits and bytes."""

import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE, read_model_info
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.evaluate.fit_noise_correction import CorrectionEvaluation
from tinysd_batch.quantize.presets import SizeTarget, get_layer_type
from tinysd_batch.quantize.recipe import Recipe

NORMS_AND_BIASES = "norms and biases"


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """What quantizing knows of the model that it has written."""

    layers: dict[str, float]  # SQNR in dB: of a layer's output on held-out rows, at level fast of its weights
    held_out: Trajectories | None  # of the float model; None where nothing was drawn
    duration_s: float
    noise_correction: CorrectionEvaluation | None = (
        None  # what became of the noise correction; None where it was not measured
    )


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer's weight."""

    name: str
    layer_type: str
    weights: int
    bytes: int
    bits: int
    sqnr_db: float | None  # as in `Made`; None where it was not packed


@dataclass(slots=True)
class LayerTypeSummary:
    """All layers of one sort."""

    name: str
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class QuantizationSummary:
    """A packed model, and what making it took."""

    name: str
    level: str
    size: str  # asked for
    layers: list[LayerSummary]
    layer_types: list[LayerTypeSummary]
    unet_bytes: int
    duration_s: float
    peak_memory_bytes: int
    device: str
    recipe: dict[str, Any] | None  # None where nothing was drawn
    noise_correction: CorrectionEvaluation | None  # the noise correction, kept or not; None where it was not measured


def summarize_layers(unet: Path, sqnr_db: Mapping[str, float]) -> list[LayerSummary]:
    """Every weight of a packed UNet's folder; norms and biases together as one."""
    entries = read_json_object(unet / "config.json")["quantization_config"]["layers"]
    counts: dict[str, int] = {name: math.prod(entry["shape"]) for name, entry in entries.items()}
    sizes: dict[str, int] = {}
    for name, tensor in MappedTensors.read(unet / WEIGHTS_FILE).items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "bias" or (tensor.dim() < 2 and layer not in entries):
            layer = NORMS_AND_BIASES
        if layer not in entries:
            counts[layer] = counts.get(layer, 0) + tensor.numel()
        sizes[layer] = sizes.get(layer, 0) + tensor.numel() * tensor.element_size()
    return [
        LayerSummary(
            name, NORMS_AND_BIASES if name == NORMS_AND_BIASES else get_layer_type(name), counts[name], size,
            entries[name]["bits"] if name in entries else 16, sqnr_db.get(name),
        )
        for name, size in sizes.items()
    ]  # fmt: skip


def summarize_layer_types(layers: list[LayerSummary]) -> list[LayerTypeSummary]:
    """Largest first."""
    found: dict[str, LayerTypeSummary] = {}
    for layer in layers:
        each = found.setdefault(layer.layer_type, LayerTypeSummary(layer.layer_type))
        each.weights += layer.weights
        each.bytes += layer.bytes
    return sorted(found.values(), key=lambda each: -each.bytes)


def summarize(out: Path, made: QuantizationResult, device: str, recipe: Recipe | None) -> QuantizationSummary:
    """Of the packed model in `out`, which this process has just made."""
    layers = summarize_layers(out / "unet", made.layers)
    config = read_json_object(out / "unet" / "config.json")["quantization_config"]
    return QuantizationSummary(
        name=read_model_info(str(out)).name,
        level=config["level"],
        size=str(SizeTarget(config["preset"], config.get("target_size"))),
        layers=layers,
        layer_types=summarize_layer_types(layers),
        unet_bytes=(out / "unet" / WEIGHTS_FILE).stat().st_size,
        duration_s=made.duration_s,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=device,
        recipe=None
        if recipe is None
        else {**recipe.model_dump(exclude={"prompts", "held_out"}), "prompts": len(recipe.prompts)},
        noise_correction=made.noise_correction,
    )
