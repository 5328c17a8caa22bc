"""A packed model's noise correction, stored in its folder and applied while it draws."""

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

import tinysd_batch.diffusers  # noqa: F401 - teaches diffusers the format
from tests.support.files import write_csv
from tests.support.jobs import read_results
from tests.support.program import run_here
from tests.support.schedules import ALPHAS, SD_V1
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
DRAWN: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


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


def draw(model: TinySD, prompts: list[str], seeds: list[int], **how: Any) -> Tensor:
    found: Tensor = model.generate(prompts, seeds, output_type="latent", **{**DRAWN, **how}).images
    return found


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@given(st.floats(-0.6, 1.0), st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.integers(0, 999))
def test_what_a_model_adds_is_taken_away(slope: float, bias: list[float], time: int) -> None:
    wanted = torch.randn(2, 4, 3, 3, generator=Generator().manual_seed(1))
    found = (1 + slope) * wanted + torch.tensor(bias).view(-1, 1, 1)
    correction = NoiseCorrection(scale=1, knots=[Knot(time=time, slope=slope, bias=bias, deviation=0)])
    torch.testing.assert_close(correction.apply(found, time), wanted, rtol=1e-4, atol=1e-4)


def test_between_knots_numbers_are_interpolated_and_beyond_them_they_stay() -> None:
    assert CORRECTION.interpolate(451) == pytest.approx([-0.2, 0.3, 0.05, 0.0, -0.05, 0.1])
    assert CORRECTION.interpolate(0) == CORRECTION.interpolate(1)
    assert CORRECTION.interpolate(999) == CORRECTION.interpolate(901)


def test_a_folder_with_a_correction_draws_and_is_called_otherwise(model: TinySD, tiny_model: Path) -> None:
    plain = TinySD.from_pretrained(tiny_model, device="cpu")
    assert (draw(plain, ["cat"], [1]) - draw(model, ["cat"], [1])).abs().max() > 0.01
    assert plain.info.digest != model.info.digest


def test_inspect_tells_of_it(corrected: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert (
        "corrects its noise, as measured at 2 times and scale 2" in run_here("inspect", corrected, cwd=tmp_path).stdout
    )
    assert "corrects" not in run_here("inspect", tiny_model, cwd=tmp_path).stdout
    told = json.loads(run_here("inspect", corrected, "--json", cwd=tmp_path).stdout)
    assert NoiseCorrection.model_validate(told["noise_correction"]) == CORRECTION


@pytest.mark.parametrize("sampler", ["plms", "euler_a", "unipc"])
def test_pictures_do_not_depend_on_their_company(model: TinySD, sampler: str) -> None:
    prompts, seeds, how = ["cat", "dog", "bell"], [1, 2, 3], {"sampler": sampler, "eta": 0.5}
    together = draw(model, prompts, seeds, **how)
    for number in range(3):
        alone = draw(model, prompts[number : number + 1], seeds[number : number + 1], **how)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-4)


def test_streamed_pictures_are_the_same(model: TinySD, corrected: Path) -> None:
    small = TinySD.from_pretrained(corrected, device="cpu", vram_budget=1_000_000, unet_bs=1)
    one, other = (draw(each, ["cat", "dog"], [1, 2]) for each in (model, small))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_job_that_goes_on_keeps_its_ids_and_pictures(corrected: Path, tiny_model: Path, tmp_path: Path) -> None:
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


def test_samplers_draw_less_noise_only_where_the_correction_says_so(model: TinySD) -> None:
    less = {sampler: draw(model, ["cat"], [1], sampler=sampler) for sampler in ("euler_a", "euler")}
    model.correction = CORRECTION.with_absorbs(False)
    assert not torch.equal(less["euler_a"], draw(model, ["cat"], [1], sampler="euler_a"))
    assert torch.equal(less["euler"], draw(model, ["cat"], [1], sampler="euler"))
    model.correction = CORRECTION


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler_a", "dpm2_a"])
def test_errors_do_for_noise(sampler: str) -> None:
    """Of data whose noise is known but for errors of a known size, drawings vary about as they would without these."""
    errors = Generator().manual_seed(1)

    def variance(error: float, deviation: float) -> float:
        def predict(latents: Tensor, time: Tensor) -> Tensor:
            share: float = (1 - ALPHAS[round(float(time))]) ** 0.5  # exact for data of variance 1
            return share * latents + error * torch.randn(latents.shape, generator=errors)

        generators = [Generator().manual_seed(2)]
        run = SamplingRun(predict, 20, SD_V1, generators, eta=1.0, deviation=lambda _: deviation)
        return float(sample(sampler, run, sample_noise(generators, (4, 64, 64))).var())

    wanted = variance(0.0, 0.0)
    assert abs(variance(0.3, 0.3) - wanted) < 0.5 * (variance(0.3, 0.0) - wanted)


# diffusers


def test_diffusers_draws_the_same(model: TinySD, corrected: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(corrected)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.sample_size
    start = torch.randn(1, 4, size, size, generator=Generator().manual_seed(7))
    asked = {"latents": start, "output_type": "latent", **DRAWN}
    theirs = pipeline("red apple", **asked).images
    ours = draw(model, ["red apple"], [7], sampler="ddim")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.scheduler = pipeline.scheduler
    assert torch.equal(again("red apple", **asked).images, theirs)


def test_diffusers_rows_of_different_times_are_each_corrected(corrected: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(corrected / "unet")
    given = torch.randn(2, 4, 8, 8), torch.tensor([1, 901]), torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        both = unet(*given).sample
        for row in range(2):
            (alone,) = unet(*(one[row : row + 1] for one in given), return_dict=False)
            torch.testing.assert_close(alone[0], both[row], rtol=1e-4, atol=1e-4)


# Damage


def change_knot(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["knots"][1].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_knot(slope=-1.0), r"knots\.1\.slope = '?-1\.0"),
        (change_knot(slope="much"), r"knots\.1\.slope = 'much'"),
        (change_knot(bias=[0.0]), r"all knots must have as many biases"),
        (change_knot(bias=[float("nan")] * 4), r"knots\.1\.bias\.0"),
        (change_knot(time=1), r"times must rise"),
        (change_knot(deviation=-1.0), r"knots\.1\.deviation"),
        (change_knot(other=1), r"knots\.1\.other"),
        (lambda entry: entry.update(knots=[]), r"knots = "),
        (lambda entry: entry.update(knots=entry["knots"] * 600), r"knots = "),
        (lambda entry: [knot.update(bias=[0.0] * 3) for knot in entry["knots"]], r"3 biases a knot; .* 4 channels"),
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
    named = rf"{path}: {CONFIG_KEY}.*{message}"
    with pytest.raises(ModelError, match=named):
        TinySD.from_pretrained(folder)
    with pytest.raises(ModelError, match=named):
        UNet2DConditionModel.from_pretrained(folder / "unet")


def test_an_entry_that_is_no_object_is_refused(corrected: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(corrected, folder)
    path = folder / "unet" / "config.json"
    config = read_json_object(path)
    config["quantization_config"][CONFIG_KEY] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{path}: {CONFIG_KEY} = "):
        TinySD.from_pretrained(folder)
