"""What correcting a packed model's noise predictions saves, with the program's own measuring and drawing.

    python -m benchmarks.quantize.noise_correction MODEL...      packed folders of the embedded model
        --prompts N       held-out prompts that measure (default 24)
        --scales A,B      of guidance (default 1,2,4)

The correction is fitted as `quantize --level calib` fits it, at the recipe's scale, on the prompts that it sets apart.
The first table says in decibels how close the final latents of held-out prompts come to the float model's of the same
seed and scale: without correction, with slopes, with slopes and biases, and with slopes fitted at the table's scale.
The second asks how much fresh noise a sampler should draw: beside the decibels it prints the drawings' spread, which is
the standard deviation of their latents over the float model's. A correction that a folder holds already is left out.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.quantize.compare_quantizers import CPU, held_out, log
from tests.support.paths import ROOT
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.model.sampling.noise_correction import NoiseCorrection
from tinysd_batch.quantize.calibration.trajectories import (
    HELD_OUT_SEED_OFFSET,
    TUNING_PROMPT_INTERVAL,
    Trajectories,
    generate_trajectories,
)
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.evaluate.compare import compute_sqnr_db
from tinysd_batch.quantize.evaluate.fit_noise_correction import fit_correction
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.quantize.sources.open import open_source
from training.repack import float_folder

STOCHASTIC = {"euler_a": 0.0, "ddim": 1.0}  # and eta


@dataclass(frozen=True, slots=True)
class CorrectionBenchmark:
    """What all models share."""

    recipe: Recipe
    held: Trajectories
    apart: Trajectories
    floats: TinySD

    def draw(self, model: TinySD, scale: float, sampler: str = "ddim", eta: float = 0.0) -> Tensor:
        """Final latents of the held-out prompts."""
        first = self.recipe.seed + HELD_OUT_SEED_OFFSET
        found: Tensor = model.generate(
            None, list(range(first, first + len(self.held.context))), sampler=sampler, eta=eta, guidance_scale=scale,
            num_inference_steps=self.recipe.steps, prompt_embeds=self.held.context, output_type="latent",
            negative_prompt_embeds=self.held.context_without,
        ).images  # fmt: skip
        return found


def load_tuning_trajectories(floats: Path, recipe: Recipe) -> Trajectories:
    """The float model's drawings of the prompts that calibration sets apart."""
    part = open_source(floats, SourceOptions()).unet()
    prompts = recipe.prompts[TUNING_PROMPT_INTERVAL // 2 :: TUNING_PROMPT_INTERVAL]
    return generate_trajectories(SegmentedUNet(part.config, part.tensors, CPU), floats, recipe, prompts, recipe.seed)


def print_scales(bench: CorrectionBenchmark, model: TinySD, name: str, wanted: Mapping[float, Tensor]) -> None:
    fitted = fit_correction(model, bench.apart, bench.recipe.scale)
    ways: dict[str, NoiseCorrection | None] = {
        "none": None,
        "slopes": fitted.without_bias(),
        "slopes and biases": fitted,
    }
    for scale, latents in wanted.items():
        ways.pop("slopes fitted there", None)
        if scale != bench.recipe.scale:
            ways["slopes fitted there"] = fit_correction(model, bench.apart, scale).without_bias()
        for way, correction in ways.items():
            model.correction = correction
            print(
                f"{name:<16}{scale:>6g}  {way:<22}{compute_sqnr_db(latents, bench.draw(model, scale)):>10.2f}",
                flush=True,
            )


def print_noise(bench: CorrectionBenchmark, model: TinySD, name: str, wanted: Mapping[str, Tensor]) -> None:
    scale = bench.recipe.scale
    slopes = fit_correction(model, bench.apart, scale).without_bias()
    for sampler, eta in STOCHASTIC.items():
        for way, correction in {"none": None, "slopes": slopes, "and less noise": slopes.with_absorbs(True)}.items():
            model.correction = correction
            found = bench.draw(model, scale, sampler, eta)
            print(
                f"{name:<16}{sampler:<8}{way:<18}{compute_sqnr_db(wanted[sampler], found):>8.2f}"
                f"{float(found.std() / wanted[sampler].std()):>10.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--scales", default="1,2,4")
    parser.add_argument("--out", type=Path, default=Path("outputs/quantizers"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = float_folder(arguments.out / "embedded-floats")
    recipe = read_recipe(ROOT / "configs" / "quantize" / "embedded.toml")
    recipe = recipe.model_copy(update={"held_out": recipe.held_out[: arguments.prompts]})
    log("drawing by the float model")
    floats = TinySD.from_pretrained(folder, device="cpu", dtype="full")
    bench = CorrectionBenchmark(
        recipe, held_out(folder, recipe, arguments.out), load_tuning_trajectories(folder, recipe), floats
    )
    models = {path.name: TinySD.from_pretrained(path, device="cpu", dtype="full") for path in arguments.models}
    print(f"{'model':<16}{'scale':>6}  {'corrected':<22}{'latents dB':>10}")
    by_scale = {scale: bench.draw(floats, scale) for scale in map(float, arguments.scales.split(","))}
    for name, model in models.items():
        print_scales(bench, model, name, by_scale)
    print(f"\n{'model':<16}{'sampler':<8}{'corrected':<18}{'dB':>8}{'spread':>10}")
    by_sampler = {sampler: bench.draw(floats, recipe.scale, sampler, eta) for sampler, eta in STOCHASTIC.items()}
    for name, model in models.items():
        print_noise(bench, model, name, by_sampler)


if __name__ == "__main__":
    main()
