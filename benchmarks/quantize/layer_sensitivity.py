"""Which layers suffer from few bits: the embedded model's float UNet with one sort of layers of one level at 2 bits.

    python -m benchmarks.quantize.layer_sensitivity  a line for each sort and level, then one for each preset
        --model MINE --recipe FILE                a float folder of your own, and prompts for it
        --prompts N                               of the recipe's held-out prompts (default 8)

Levels count from the largest maps. Errors are those of the guided noise prediction along the float model's
trajectories, without calibration. `weighs` is that error over the layers' own relative errors: what
`quantize --target-size` takes to be the harm of an error in such a layer (`quantize/bit_allocation.py`).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.quantize.compare_quantizers import held_out
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
from tinysd_batch.quantize.sources.open import open_source
from training.repack import float_folder

TIMESTEP_INTERVAL = 3  # of the trajectory's times


class SensitivityBenchmark:
    """A float UNet whose weights change places."""

    def __init__(self, part: SourceComponent, held: Trajectories, scale: float) -> None:
        self.tensors = {name: value.float() for name, value in part.tensors.items()}
        self.unet = UNet2DConditionModel.from_config(dict(part.config)).eval()
        self.held = held
        self.scale = scale

    def noise_db(self, weights: Mapping[str, Tensor]) -> float:
        """Of the guided noise prediction, with these weights in place of the layers' own."""
        changed = {f"{name}.weight": value for name, value in weights.items()}
        self.unet.load_state_dict(self.tensors | changed, assign=True)
        context = torch.cat([self.held.context_without, self.held.context])
        found = []
        for latents, time, wanted in zip(
            self.held.latents, self.held.times, self.held.guided_noise(self.scale), strict=True
        ):
            without, with_text = self.unet(torch.cat([latents, latents]), time, context).sample.chunk(2)
            found.append(compute_sqnr_db(wanted, without + self.scale * (with_text - without)))
        return float(np.mean(found))


def quantize_and_unpack(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """What the layers' weights become at level fast."""
    found = {}
    for name, layout in layouts.items():
        weight = tensors[f"{name}.weight"].float()
        matrix = to_matrix(weight)
        packed = quantize_matrix(matrix, layout.group_size_in(matrix.shape[1]), layout.bits)
        found[name] = from_matrix(dequantize(packed, torch.empty(packed.shape)), weight.shape)
    return found


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
    held = held_out(floats, recipe, arguments.out)
    some = {name: getattr(held, name)[::TIMESTEP_INTERVAL] for name in ("latents", "times", "noise", "noise_without")}
    part = open_source(floats, SourceOptions()).unet()
    bench = SensitivityBenchmark(
        part, Trajectories(**some, final=held.final, context=held.context, context_without=held.context_without),
        recipe.scale,
    )  # fmt: skip
    print_groups(bench)
    print_presets(bench)


def print_groups(bench: SensitivityBenchmark) -> None:
    layouts, tensors = get_preset_layouts(bench.unet, "tiny"), bench.tensors
    levels = len(bench.unet.down_blocks)
    groups: dict[tuple[str, int], list[str]] = {}
    for name in layouts:
        groups.setdefault((get_layer_type(name), get_block_level(name, levels)), []).append(name)
    print(f"{'alone at 2 bits':<24}{'level':>6}{'layers':>8}{'weights':>10}{'noise dB':>10}{'weighs':>10}")
    for (sort, level), names in sorted(groups.items()):
        weights = quantize_and_unpack(tensors, {name: layouts[name] for name in names})
        own = sum(relative_error(tensors[f"{name}.weight"], value) for name, value in weights.items())
        found = bench.noise_db(weights)
        count = sum(value.numel() for value in weights.values())
        print(f"{sort:<24}{level:>6}{len(names):>8}{count:>10,}{found:>10.2f}{10 ** (-found / 10) / own:>10.5f}")


def print_presets(bench: SensitivityBenchmark) -> None:
    print(f"\n{'preset':<24}{'MB':>10}{'noise dB':>10}")
    for preset in PRESETS:
        layouts = get_preset_layouts(bench.unet, preset)
        found = bench.noise_db(quantize_and_unpack(bench.tensors, layouts))
        print(f"{preset:<24}{compute_unet_bytes(bench.unet, layouts) / 1e6:>10.2f}{found:>10.2f}")


if __name__ == "__main__":
    main()
