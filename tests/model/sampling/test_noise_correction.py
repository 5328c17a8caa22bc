"""A packed model's noise correction, stored in its folder and applied while it generates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, Tensor

import tinysd_batch.diffusers  # noqa: F401 - registers the format with diffusers
from tests.support.files import write_csv
from tests.support.jobs import read_results
from tests.support.models.schedules import ALPHAS, SD_V1
from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.sampling.noise_correction import CONFIG_KEY, Knot, NoiseCorrection, write_correction
from tinysd_batch.model.sampling.samplers import sample
from tinysd_batch.model.sampling.schedule import SamplingRun, sample_noise

BIAS = [0.1, 0.0, -0.1, 0.2]
CORRECTION = NoiseCorrection(
    scale=2.0,
    absorbs=True,
    knots=[
        Knot(time=1, slope=-0.1, bias=[0.0] * 4, deviation=0.1),
        Knot(time=901, slope=-0.3, bias=BIAS, deviation=0.5),
    ],
)
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def corrected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed model with a correction."""
    folder = tmp_path_factory.mktemp("corrected") / "model"
    shutil.copytree(tiny_model, folder)
    write_correction(folder / "unet", CORRECTION)
    return folder


@pytest.fixture(scope="module")
def model(corrected: Path) -> TinySD:
    return TinySD.from_pretrained(corrected, device="cpu")


def generate_latents(model: TinySD, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    latents: Tensor = model.generate(prompts, seeds, output_type="latent", **{**OPTIONS, **options}).images
    return latents


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@given(st.floats(-0.6, 1.0), st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.integers(0, 999))
def test_slope_and_bias_are_removed(slope: float, bias: list[float], time: int) -> None:
    wanted = torch.randn(2, 4, 3, 3, generator=Generator().manual_seed(1))
    predicted = (1 + slope) * wanted + torch.tensor(bias).view(-1, 1, 1)
    correction = NoiseCorrection(scale=1, knots=[Knot(time=time, slope=slope, bias=bias, deviation=0)])
    torch.testing.assert_close(correction.apply(predicted, time), wanted, rtol=1e-4, atol=1e-4)


def test_values_are_interpolated_between_knots_and_constant_beyond_them() -> None:
    assert CORRECTION.interpolate(451) == pytest.approx([-0.2, 0.3, 0.05, 0.0, -0.05, 0.1])
    assert CORRECTION.interpolate(0) == CORRECTION.interpolate(1)
    assert CORRECTION.interpolate(999) == CORRECTION.interpolate(901)


def test_a_correction_changes_images_and_digest(model: TinySD, tiny_model: Path) -> None:
    plain = TinySD.from_pretrained(tiny_model, device="cpu")
    assert (generate_latents(plain, ["cat"], [1]) - generate_latents(model, ["cat"], [1])).abs().max() > 0.01
    assert plain.info.digest != model.info.digest


def test_inspect_reports_it(corrected: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert (
        "noise correction, measured at 2 timesteps with scale 2" in run_here("inspect", corrected, cwd=tmp_path).stdout
    )
    assert "noise correction" not in run_here("inspect", tiny_model, cwd=tmp_path).stdout
    inspected = json.loads(run_here("inspect", corrected, "--json", cwd=tmp_path).stdout)
    assert NoiseCorrection.model_validate(inspected["noise_correction"]) == CORRECTION


@pytest.mark.parametrize("sampler", ["plms", "euler_a", "unipc"])
def test_images_do_not_depend_on_their_batch(model: TinySD, sampler: str) -> None:
    prompts, seeds, options = ["cat", "dog", "bell"], [1, 2, 3], {"sampler": sampler, "eta": 0.5}
    together = generate_latents(model, prompts, seeds, **options)
    for number in range(3):
        alone = generate_latents(model, prompts[number : number + 1], seeds[number : number + 1], **options)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-4)


def test_streamed_images_are_the_same(model: TinySD, corrected: Path) -> None:
    streaming = TinySD.from_pretrained(corrected, device="cpu", vram_budget=1_000_000, unet_bs=1)
    resident, streamed = (generate_latents(tinysd, ["cat", "dog"], [1, 2]) for tinysd in (model, streaming))
    torch.testing.assert_close(resident, streamed, rtol=1e-4, atol=1e-4)


def test_a_resumed_job_keeps_its_ids_and_images(corrected: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"prompt": "cat", "seed": 1}, {"prompt": "dog", "seed": 2}])
    submit = "submit", "m.csv", "--inline", "--steps", 2, "--n_samples", 2, "--model"
    assert run_here(*submit, corrected, "-o", "stopped", "--limit", 1, cwd=tmp_path).returncode == 0
    for name, model in (("stopped", corrected), ("whole", corrected), ("plain", tiny_model)):
        assert run_here(*submit, model, "-o", name, cwd=tmp_path).returncode == 0
    stopped, whole, plain = (
        {(row["image_id"], pixels(tmp_path / name / row["file_name"])) for row in read_results(tmp_path / name)}
        for name in ("stopped", "whole", "plain")
    )
    assert stopped == whole
    assert not whole & plain


# Stochastic samplers


def test_samplers_add_less_noise_only_if_the_correction_absorbs(model: TinySD) -> None:
    with_less_noise = {
        sampler: generate_latents(model, ["cat"], [1], sampler=sampler) for sampler in ("euler_a", "euler")
    }
    model.correction = CORRECTION.with_absorbs(False)
    assert not torch.equal(with_less_noise["euler_a"], generate_latents(model, ["cat"], [1], sampler="euler_a"))
    assert torch.equal(with_less_noise["euler"], generate_latents(model, ["cat"], [1], sampler="euler"))
    model.correction = CORRECTION


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler_a", "dpm2_a"])
def test_prediction_errors_replace_fresh_noise(sampler: str) -> None:
    """Errors of a known size leave the variance of images about the same if less fresh noise is added."""
    errors = Generator().manual_seed(1)

    def variance(error: float, deviation: float) -> float:
        def predict(latents: Tensor, time: Tensor) -> Tensor:
            noise_share: float = (1 - ALPHAS[round(float(time))]) ** 0.5  # exact for data of variance 1
            return noise_share * latents + error * torch.randn(latents.shape, generator=errors)

        generators = [Generator().manual_seed(2)]
        run = SamplingRun(predict, 20, SD_V1, generators, eta=1.0, deviation=lambda _: deviation)
        return float(sample(sampler, run, sample_noise(generators, (4, 64, 64))).var())

    wanted = variance(0.0, 0.0)
    assert abs(variance(0.3, 0.3) - wanted) < 0.5 * (variance(0.3, 0.0) - wanted)


# diffusers


def test_diffusers_generates_the_same(model: TinySD, corrected: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(corrected)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.sample_size
    start = torch.randn(1, 4, size, size, generator=Generator().manual_seed(7))
    arguments = {"latents": start, "output_type": "latent", **OPTIONS}
    theirs = pipeline("red apple", **arguments).images
    ours = generate_latents(model, ["red apple"], [7], sampler="ddim")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    reloaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    reloaded.scheduler = pipeline.scheduler
    assert torch.equal(reloaded("red apple", **arguments).images, theirs)


def test_diffusers_corrects_each_row_for_its_timestep(corrected: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(corrected / "unet")
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 901]), torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        both = unet(*inputs).sample
        for row in range(2):
            (alone,) = unet(*(value[row : row + 1] for value in inputs), return_dict=False)
            torch.testing.assert_close(alone[0], both[row], rtol=1e-4, atol=1e-4)


# Damage


def change_knot(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["knots"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_knot(slope=-1.0), r"knots\.1\.slope = '?-1\.0"),
        (change_knot(slope="much"), r"knots\.1\.slope = 'much'"),
        (change_knot(bias=[0.0]), r"all knots must have the same number of biases"),
        (change_knot(bias=[float("nan")] * 4), r"knots\.1\.bias\.0"),
        (change_knot(time=1), r"times of the knots must be in ascending order"),
        (change_knot(deviation=-1.0), r"knots\.1\.deviation"),
        (change_knot(other=1), r"knots\.1\.other"),
        (lambda entry: entry.update(knots=[]), r"knots = "),
        (lambda entry: entry.update(knots=entry["knots"] * 600), r"knots = "),
        (lambda entry: [knot.update(bias=[0.0] * 3) for knot in entry["knots"]], r"3 biases per knot; .* 4 channels"),
        (lambda entry: entry.pop("scale"), r"scale"),
    ],
)
def test_a_damaged_correction_is_refused_by_name(
    corrected: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(corrected, folder)
    path = folder / "unet" / "config.json"
    config = read_json_object(path)
    change(config["quantization_config"][CONFIG_KEY])
    path.write_text(json.dumps(config))
    message = rf"{path}: {CONFIG_KEY}.*{message}"
    with pytest.raises(ModelError, match=message):
        TinySD.from_pretrained(folder)
    with pytest.raises(ModelError, match=message):
        UNet2DConditionModel.from_pretrained(folder / "unet")


def test_an_entry_that_is_not_an_object_is_refused(corrected: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(corrected, folder)
    path = folder / "unet" / "config.json"
    config = read_json_object(path)
    config["quantization_config"][CONFIG_KEY] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{path}: {CONFIG_KEY} = "):
        TinySD.from_pretrained(folder)
