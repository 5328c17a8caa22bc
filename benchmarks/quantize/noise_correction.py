"""What a noise correction gains on packed models, and how much fresh noise samplers should then add.

    python -m benchmarks.quantize.noise_correction MODEL...
        packed folders of the embedded model
    --prompts N       held-out prompts to evaluate on (default 24)
    --scales A,B      guidance scales (default 1,2,4)

The correction is fitted as `quantize --level calib` does it, at the recipe's guidance scale, on the tuning prompts. The
first table has the SQNR in dB of the final latents of held-out prompts against the float model's with the same seed and
scale: without correction, with slopes, with slopes and biases, and with slopes fitted at the table's scale. The second
table is about stochastic samplers: beside the SQNR it has the spread, which is the standard deviation of the latents
over that of the float model's. A correction that a folder already contains is not used.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.quantize.compare_quantizers import CPU, load_held_out_trajectories, log
from tests.support.paths import ROOT
from tinysd_batch.model.sampling.noise_correction import NoiseCorrection
from tinysd_batch.model.tiny_sd import TinySD
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
from tinysd_batch.quantize.sources.formats import open_source
from training.repack import float_folder

STOCHASTIC = {"euler_a": 0.0, "ddim": 1.0}  # samplers that add noise, and their eta


@dataclass(frozen=True, slots=True)
class CorrectionBenchmark:
    """What all models share."""

    recipe: Recipe
    held_out: Trajectories
    tuning: Trajectories
    float_model: TinySD

    def generate(self, model: TinySD, scale: float, sampler: str = "ddim", eta: float = 0.0) -> Tensor:
        """Return the final latents of the held-out prompts, [P, 4, h, w]."""
        first_seed = self.recipe.seed + HELD_OUT_SEED_OFFSET
        latents: Tensor = model.generate(
            None, list(range(first_seed, first_seed + len(self.held_out.context))), sampler=sampler, eta=eta,
            guidance_scale=scale, num_inference_steps=self.recipe.steps, prompt_embeds=self.held_out.context,
            output_type="latent", negative_prompt_embeds=self.held_out.context_without,
        ).images  # fmt: skip
        return latents


def generate_tuning_trajectories(floats: Path, recipe: Recipe) -> Trajectories:
    """Generate the trajectories of the tuning prompts with the float model."""
    component = open_source(floats, SourceOptions()).unet()
    unet = SegmentedUNet(component.config, component.tensors, CPU)
    prompts = recipe.prompts[TUNING_PROMPT_INTERVAL // 2 :: TUNING_PROMPT_INTERVAL]
    return generate_trajectories(unet, floats, recipe, prompts, recipe.seed)


def print_scales(bench: CorrectionBenchmark, model: TinySD, name: str, wanted: Mapping[float, Tensor]) -> None:
    """Print the first table's lines of one model; `wanted` has the float model's latents by scale."""
    fitted = fit_correction(model, bench.tuning, bench.recipe.scale)
    corrections: dict[str, NoiseCorrection | None] = {
        "none": None,
        "slopes": fitted.without_bias(),
        "slopes and biases": fitted,
    }
    for scale, wanted_latents in wanted.items():
        corrections.pop("slopes of this scale", None)
        if scale != bench.recipe.scale:
            corrections["slopes of this scale"] = fit_correction(model, bench.tuning, scale).without_bias()
        for label, correction in corrections.items():
            model.correction = correction
            sqnr_db = compute_sqnr_db(wanted_latents, bench.generate(model, scale))
            print(f"{name:<16}{scale:>6g}  {label:<22}{sqnr_db:>10.2f}", flush=True)


def print_noise(bench: CorrectionBenchmark, model: TinySD, name: str, wanted: Mapping[str, Tensor]) -> None:
    """Print the second table's lines of one model; `wanted` has the float model's latents by sampler."""
    scale = bench.recipe.scale
    slopes = fit_correction(model, bench.tuning, scale).without_bias()
    corrections = {"none": None, "slopes": slopes, "and less noise": slopes.with_absorbs(True)}
    for sampler, eta in STOCHASTIC.items():
        for label, correction in corrections.items():
            model.correction = correction
            latents = bench.generate(model, scale, sampler, eta)
            print(
                f"{name:<16}{sampler:<8}{label:<18}{compute_sqnr_db(wanted[sampler], latents):>8.2f}"
                f"{float(latents.std() / wanted[sampler].std()):>10.3f}",
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
    log("generating with the float model")
    float_model = TinySD.from_pretrained(folder, device="cpu", dtype="full")
    held_out = load_held_out_trajectories(folder, recipe, arguments.out)
    bench = CorrectionBenchmark(recipe, held_out, generate_tuning_trajectories(folder, recipe), float_model)
    models = {path.name: TinySD.from_pretrained(path, device="cpu", dtype="full") for path in arguments.models}
    print(f"{'model':<16}{'scale':>6}  {'correction':<22}{'latents dB':>10}")
    by_scale = {scale: bench.generate(float_model, scale) for scale in map(float, arguments.scales.split(","))}
    for name, model in models.items():
        print_scales(bench, model, name, by_scale)
    print(f"\n{'model':<16}{'sampler':<8}{'correction':<18}{'dB':>8}{'spread':>10}")
    by_sampler = {
        sampler: bench.generate(float_model, recipe.scale, sampler, eta) for sampler, eta in STOCHASTIC.items()
    }
    for name, model in models.items():
        print_noise(bench, model, name, by_sampler)


if __name__ == "__main__":
    main()
