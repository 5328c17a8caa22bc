"""What correcting a packed model's noise prediction would save: bias and signed slope at each time, after PTQD.

    python -m benchmarks.noise_correction MODEL...      packed folders of the embedded model
        --prompts N       of the recipe that fit, and as many held-out ones that measure (default 24)

The packed model says e = (1 + slope) * wanted + bias + rest. Slope (a number at each time, clamped at -0.6) and bias
(of each channel) are fitted where the float model went; then held-out prompts are drawn with (e - bias) / (1 + slope).
Nothing of this is in the program yet. PTQD: He et al. 2023, which has no negative slopes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quantizers import CPU, ROOT, embedded_floats, held_out, tell
from tinysd_batch.model.checkpoint import read_schedule
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.model.samplers import Run, ddim
from tinysd_batch.quantize.folder import open_source
from tinysd_batch.quantize.measure import guided_noise, sqnr_db
from tinysd_batch.quantize.recipe import read_recipe
from tinysd_batch.quantize.sources import Options
from tinysd_batch.quantize.trajectories import Trajectories, draw
from tinysd_batch.quantize.units import Walker

LEAST_SLOPE = -0.6
WAYS = {"none": (0, 0), "slope": (1, 0), "slope and bias": (1, 1)}  # shares of slope and bias that are corrected


def fit(model: TinySD, drawn: Trajectories, scale: float) -> tuple[Tensor, Tensor]:
    """Slopes [S] and biases [S, 4]."""
    slopes, biases = [], []
    for wanted, found in zip(drawn.guided(scale), guided_noise(model, drawn, scale), strict=True):
        mean, mean_found = wanted.mean(dim=(0, 2, 3)), found.mean(dim=(0, 2, 3))
        around = wanted - mean[:, None, None]
        slope = (around * (found - mean_found[:, None, None])).sum() / around.square().sum() - 1
        slopes.append(slope.clamp(min=LEAST_SLOPE))
        biases.append(mean_found - (1 + slopes[-1]) * mean)
    return torch.stack(slopes), torch.stack(biases)


def draw_corrected(
    model: TinySD, held: Trajectories, scale: float, schedule: dict[str, float], slopes: Tensor, biases: Tensor
) -> list[Tensor]:
    """The latents after each step."""
    context = torch.cat([held.context_without, held.context])
    place = {float(time): at for at, time in enumerate(held.times)}
    given: list[Tensor] = []

    def predict(latents: Tensor, time: Tensor) -> Tensor:
        given.append(latents.clone())
        without, with_text = model.predict_noise(torch.cat([latents, latents]), time, context).chunk(2)
        at = place[float(time)]
        return (without + scale * (with_text - without) - biases[at][:, None, None]) / (1 + slopes[at])

    generators = [torch.Generator() for _ in held.context]
    with model.residency.holding(model.encode_fragment, model.decode_fragment):
        final = ddim(Run(predict, len(held.times), schedule, generators), held.latents[0].clone())
    return [*given[1:], final]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("outputs/quantizers"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    floats = embedded_floats(arguments.out / "embedded-floats")
    recipe = read_recipe(ROOT / "configs" / "quantize" / "embedded.toml")
    recipe = recipe.model_copy(update={"held_out": recipe.held_out[: arguments.prompts]})
    held = held_out(floats, recipe, arguments.out)
    tell("drawing calibration prompts by the float model")
    part = open_source(floats, Options()).unet()
    walker = Walker(part.config, part.tensors, CPU)
    drawn = draw(walker, floats, recipe, recipe.prompts[: arguments.prompts], recipe.seed)
    schedule = read_schedule(floats / "scheduler" / "scheduler_config.json")
    print(f"{'model':<24}{'corrected':<16}{'final latents dB':>18}{'along the way dB':>18}")
    for path in arguments.models:
        model = TinySD.from_pretrained(path, device="cpu", dtype="full")
        slopes, biases = fit(model, drawn, recipe.scale)
        for way, (slope, bias) in WAYS.items():
            found = draw_corrected(model, held, recipe.scale, schedule, slope * slopes, bias * biases)
            wanted = [*held.latents[1:], held.final]
            along = float(np.mean([sqnr_db(*pair) for pair in zip(wanted, found, strict=True)]))
            print(f"{path.name:<24}{way:<16}{sqnr_db(held.final, found[-1]):>18.2f}{along:>18.2f}", flush=True)


if __name__ == "__main__":
    main()
