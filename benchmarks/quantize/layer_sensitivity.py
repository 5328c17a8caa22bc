"""Which layers suffer most from few bits: the embedded model's float UNet with only some layers at 2 bits.

    python -m benchmarks.quantize.layer_sensitivity
        a line for each layer type and level, then one for each preset
    --model MINE --recipe FILE    a float folder of your own, and prompts for it
    --prompts N                   of the recipe's held-out prompts (default 8)

Level 0 has the largest feature maps. Errors are those of the guided noise prediction along the float model's
trajectories, without calibration. `sensitivity` is that error over the sum of the layers' own relative errors: the
weight that `quantize --target-size` gives an error in such a layer (`quantize/bit_allocation.py`).
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.quantize.compare_quantizers import load_held_out_trajectories
from tests.support.paths import ROOT
from tinysd_batch.model.packed.dequantize import dequantize
from tinysd_batch.model.packed.format import Layout, from_matrix, to_matrix
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.evaluate.compare import compute_sqnr_db
from tinysd_batch.quantize.presets import (
    PRESETS,
    compute_unet_bytes,
    get_block_level,
    get_layer_type,
    get_preset_layouts,
)
from tinysd_batch.quantize.recipe import read_recipe
from tinysd_batch.quantize.solve.affine import quantize_matrix
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent, SourceOptions
from tinysd_batch.quantize.sources.formats import open_source
from training.repack import float_folder

TIMESTEP_INTERVAL = 3  # evaluate on every third step of a trajectory


class SensitivityBenchmark:
    """A float UNet in which the weights of some layers are replaced."""

    def __init__(self, component: SourceComponent, held_out: Trajectories, scale: float) -> None:
        self.tensors = {name: value.float() for name, value in component.tensors.items()}
        self.unet = UNet2DConditionModel.from_config(dict(component.config)).eval()
        self.held_out = held_out
        self.scale = scale

    def measure_noise_db(self, weights: Mapping[str, Tensor]) -> float:
        """Return the mean SQNR of the guided noise prediction with these layers' weights replaced."""
        replaced = {f"{name}.weight": value for name, value in weights.items()}
        self.unet.load_state_dict(self.tensors | replaced, assign=True)
        held_out = self.held_out
        context = torch.cat([held_out.context_without, held_out.context])
        sqnr_db = []
        for latents, time, wanted in zip(
            held_out.latents, held_out.times, held_out.guided_noise(self.scale), strict=True
        ):
            noise_without, noise = self.unet(torch.cat([latents, latents]), time, context).sample.chunk(2)
            sqnr_db.append(compute_sqnr_db(wanted, noise_without + self.scale * (noise - noise_without)))
        return float(np.mean(sqnr_db))


def quantize_and_unpack(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Return the layers' weights after data-free quantization."""
    weights = {}
    for name, layout in layouts.items():
        weight = tensors[f"{name}.weight"].float()
        matrix = to_matrix(weight)
        packed = quantize_matrix(matrix, layout.group_size_in(matrix.shape[1]), layout.bits)
        weights[name] = from_matrix(dequantize(packed, torch.empty(packed.shape)), weight.shape)
    return weights


def relative_error(weight: Tensor, other: Tensor) -> float:
    return float((weight - other).square().sum() / weight.square().sum())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "quantize" / "embedded.toml")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("outputs/quantizers"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    floats = arguments.model or float_folder(arguments.out / "embedded-floats")
    recipe = read_recipe(arguments.recipe)
    recipe = recipe.model_copy(update={"held_out": recipe.held_out[: arguments.prompts]})
    held_out = load_held_out_trajectories(floats, recipe, arguments.out)
    every_third = {
        name: getattr(held_out, name)[::TIMESTEP_INTERVAL] for name in ("latents", "times", "noise", "noise_without")
    }
    component = open_source(floats, SourceOptions()).unet()
    bench = SensitivityBenchmark(component, replace(held_out, **every_third), recipe.scale)
    print_groups(bench)
    print_presets(bench)


def print_groups(bench: SensitivityBenchmark) -> None:
    """Print a line for each layer type at each level."""
    layouts, tensors = get_preset_layouts(bench.unet, "tiny"), bench.tensors
    levels = len(bench.unet.down_blocks)
    groups: dict[tuple[str, int], list[str]] = {}
    for name in layouts:
        groups.setdefault((get_layer_type(name), get_block_level(name, levels)), []).append(name)
    print(f"{'only these at 2 bits':<24}{'level':>6}{'layers':>8}{'weights':>10}{'noise dB':>10}{'sensitivity':>13}")
    for (layer_type, level), names in sorted(groups.items()):
        weights = quantize_and_unpack(tensors, {name: layouts[name] for name in names})
        layer_error = sum(relative_error(tensors[f"{name}.weight"], value) for name, value in weights.items())
        noise_db = bench.measure_noise_db(weights)
        sensitivity = 10 ** (-noise_db / 10) / layer_error
        count = sum(value.numel() for value in weights.values())
        print(f"{layer_type:<24}{level:>6}{len(names):>8}{count:>10,}{noise_db:>10.2f}{sensitivity:>13.5f}")


def print_presets(bench: SensitivityBenchmark) -> None:
    print(f"\n{'preset':<24}{'MB':>10}{'noise dB':>10}")
    for preset in PRESETS:
        layouts = get_preset_layouts(bench.unet, preset)
        noise_db = bench.measure_noise_db(quantize_and_unpack(bench.tensors, layouts))
        print(f"{preset:<24}{compute_unet_bytes(bench.unet, layouts) / 1e6:>10.2f}{noise_db:>10.2f}")


if __name__ == "__main__":
    main()
