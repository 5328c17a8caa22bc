"""Summarize a packed UNet: type, bits and bytes of each layer."""

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
FLOAT_BITS = 16  # of tensors that are not packed


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """What a quantization measured of the model that it wrote."""

    layers: dict[
        str, float
    ]  # SQNR in dB of each layer: level fast: of its weight; else of its output on held-out prompts
    held_out: Trajectories | None  # of the float model; None if nothing was generated
    duration_s: float
    noise_correction: CorrectionEvaluation | None = None  # kept or not; None if none was measured


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """The weight of a layer."""

    name: str
    layer_type: str
    weights: int
    bytes: int
    bits: int
    sqnr_db: float | None  # as in `QuantizationResult.layers`; None if the layer was not packed


@dataclass(slots=True)
class LayerTypeSummary:
    """All layers of one type."""

    name: str
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class QuantizationSummary:
    """A packed model, and how long it took to quantize it."""

    name: str
    level: str
    size: str  # as requested
    layers: list[LayerSummary]
    layer_types: list[LayerTypeSummary]
    unet_bytes: int
    duration_s: float
    peak_memory_bytes: int
    device: str
    recipe: dict[str, Any] | None  # None if nothing was generated
    noise_correction: CorrectionEvaluation | None  # kept or not; None if none was measured


def summarize_layers(unet: Path, sqnr_db: Mapping[str, float]) -> list[LayerSummary]:
    """Summarize every weight in a packed UNet's folder; norms and biases count as one entry."""
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
            name,
            layer_type=NORMS_AND_BIASES if name == NORMS_AND_BIASES else get_layer_type(name),
            weights=counts[name],
            bytes=size,
            bits=entries[name]["bits"] if name in entries else FLOAT_BITS,
            sqnr_db=sqnr_db.get(name),
        )
        for name, size in sizes.items()
    ]


def summarize_layer_types(layers: list[LayerSummary]) -> list[LayerTypeSummary]:
    """Add up the layers of each type, largest type first."""
    summaries: dict[str, LayerTypeSummary] = {}
    for layer in layers:
        summary = summaries.setdefault(layer.layer_type, LayerTypeSummary(layer.layer_type))
        summary.weights += layer.weights
        summary.bytes += layer.bytes
    return sorted(summaries.values(), key=lambda summary: -summary.bytes)


def summarize(out: Path, result: QuantizationResult, device: str, recipe: Recipe | None) -> QuantizationSummary:
    """Summarize the packed model in `out`, which this process has just written."""
    layers = summarize_layers(out / "unet", result.layers)
    config = read_json_object(out / "unet" / "config.json")["quantization_config"]
    recipe_entries = None
    if recipe is not None:
        recipe_entries = {**recipe.model_dump(exclude={"prompts", "held_out"}), "prompts": len(recipe.prompts)}
    return QuantizationSummary(
        name=read_model_info(str(out)).name,
        level=config["level"],
        size=str(SizeTarget(config["preset"], config.get("target_size"))),
        layers=layers,
        layer_types=summarize_layer_types(layers),
        unet_bytes=(out / "unet" / WEIGHTS_FILE).stat().st_size,
        duration_s=result.duration_s,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=device,
        recipe=recipe_entries,
        noise_correction=result.noise_correction,
    )
