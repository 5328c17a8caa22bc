"""Fit a noise correction, and keep it only if it is an improvement."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from tests.support.models.small_unet import CPU, RECIPE
from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.sampling.noise_correction import CONFIG_KEY, Knot, NoiseCorrection, read_correction
from tinysd_batch.quantize.calibration.trajectories import Trajectories, generate_trajectories
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.evaluate.compare import generate_latents, predict_guided_noise
from tinysd_batch.quantize.evaluate.fit_noise_correction import add_noise_correction, evaluate_correction, fit_knot
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.quantize.sources.formats import open_source

SCALE = 2.0
SEED = 100
SLOPE, BIAS = -0.2, [0.1, 0.0, -0.1, 0.05]


@given(st.floats(-0.5, 0.9), st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0, 0.5), st.integers(0, 99))
def test_a_known_error_is_fitted(slope: float, bias: list[float], deviation: float, seed: int) -> None:
    generator = Generator().manual_seed(seed)
    float_noise, error = (torch.randn(8, 4, 16, 16, generator=generator) for _ in range(2))
    packed_noise = (1 + slope) * float_noise + torch.tensor(bias).view(-1, 1, 1) + deviation * error
    knot = fit_knot(501.0, float_noise, packed_noise)
    assert knot.slope == pytest.approx(slope, abs=0.05)
    assert knot.bias == pytest.approx(bias, abs=0.1)
    assert knot.deviation == pytest.approx(deviation / (1 + slope), rel=0.1, abs=1e-4)


def test_without_biases_their_error_counts_as_deviation() -> None:
    float_noise = torch.randn(8, 4, 16, 16, generator=Generator().manual_seed(1))
    float_noise -= float_noise.mean(dim=(0, 2, 3), keepdim=True)
    packed_noise = (1 + SLOPE) * float_noise + torch.tensor(BIAS).view(-1, 1, 1)
    knot = fit_knot(501.0, float_noise, packed_noise)
    error_without_bias = (packed_noise / (1 + SLOPE) - float_noise).square().mean() ** 0.5
    assert knot.deviation == pytest.approx(0, abs=1e-4)
    assert knot.without_bias().deviation == pytest.approx(float(error_without_bias), rel=1e-3)


@pytest.mark.parametrize(("spread", "absorbs"), [(1.05, True), (0.95, False)])
def test_samplers_add_less_noise_only_if_latents_vary_too_much(spread: float, absorbs: bool) -> None:
    float_latents = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(1))
    knots = [Knot(time=1, slope=SLOPE, bias=BIAS, deviation=0.1)]
    evaluation = evaluate_correction(
        NoiseCorrection(scale=SCALE, knots=knots),
        lambda correction: float_latents * (spread if correction else 0.5),
        float_latents,
    )
    assert evaluation.is_improvement
    assert evaluation.correction.absorbs == absorbs
    assert (evaluation.correction.absorbed_deviation(1) > 0) == absorbs


# Corrections of a model folder; the float model's predictions are derived from the packed model's


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture(scope="module")
def trajectories(float_model: Path) -> Trajectories:
    recipe = Recipe(prompts=["cat", "dog"], held_out=["lion", "bell"], steps=3, scale=SCALE)
    part = open_source(float_model, SourceOptions()).unet()
    return generate_trajectories(
        SegmentedUNet(part.config, part.tensors, CPU), float_model, recipe, recipe.prompts, SEED
    )


def replace_noise(trajectories: Trajectories, model: TinySD) -> Trajectories:
    """Return the same trajectories with the noise that a model predicts there."""
    with torch.no_grad():
        noise, noise_without = (torch.stack(predict_guided_noise(model, trajectories, scale)) for scale in (1.0, 0.0))
    return replace(trajectories, noise=noise, noise_without=noise_without)


def test_a_correction_that_helps_is_kept(folder: Path, trajectories: Trajectories) -> None:
    """The float model is the packed one, scaled and shifted: the correction undoes that completely."""
    model = TinySD.from_pretrained(folder, device="cpu")
    packed, bias = replace_noise(trajectories, model), torch.tensor(BIAS).view(-1, 1, 1)
    floats = replace(
        packed, noise=(packed.noise - bias) / (1 + SLOPE), noise_without=(packed.noise_without - bias) / (1 + SLOPE)
    )
    knots = [Knot(time=float(time), slope=SLOPE, bias=BIAS, deviation=0) for time in reversed(trajectories.times)]
    model.correction = NoiseCorrection(scale=SCALE, knots=knots)
    floats = replace(floats, final=generate_latents(model, floats, SEED, SCALE)[-1])
    before = read_json_object(folder / "unet" / "config.json")
    evaluation = add_noise_correction(folder, floats, floats, SEED, SCALE, CPU)
    assert evaluation.is_improvement
    assert evaluation.has_bias
    assert evaluation.sqnr_db_with > evaluation.sqnr_db_without + 20
    after = read_json_object(folder / "unet" / "config.json")
    assert read_correction(folder / "unet", 4) == evaluation.correction
    del after["quantization_config"][CONFIG_KEY]
    assert after == before
    assert TinySD.from_pretrained(folder, device="cpu").correction == evaluation.correction


def test_a_correction_that_does_not_help_is_not_kept(folder: Path, trajectories: Trajectories) -> None:
    """It is fitted on scaled predictions, but evaluated on latents that the packed model itself generates."""
    model = TinySD.from_pretrained(folder, device="cpu")
    packed = replace_noise(trajectories, model)
    scaled = replace(packed, noise=1.2 * packed.noise, noise_without=1.2 * packed.noise_without)
    held_out = replace(trajectories, final=generate_latents(model, trajectories, SEED, SCALE)[-1])
    before = (folder / "unet" / "config.json").read_bytes()
    evaluation = add_noise_correction(folder, scaled, held_out, SEED, SCALE, CPU)
    assert not evaluation.is_improvement
    assert evaluation.sqnr_db_without > evaluation.sqnr_db_with
    assert (folder / "unet" / "config.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("level", ["calib", "distill"])
def test_quantizing_evaluates_a_correction_and_reports_whether_it_is_kept(
    float_model: Path, tmp_path: Path, level: str
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE + "tune_steps = 2\nbatch = 4\n")
    quantize = ("quantize", float_model, "out", "--level", level, "--recipe", "recipe.toml", "--preset", "tiny")
    result = run_here(*quantize, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    correction = report["noise_correction"]
    sqnr_db_with, sqnr_db_without = (correction[f"final_latents_sqnr_db_{which}"] for which in ("with", "without"))
    assert not correction["kept"] or sqnr_db_with > sqnr_db_without
    expected_db = sqnr_db_with if correction["kept"] else sqnr_db_without
    assert report["final_latents_sqnr_db"] == pytest.approx(expected_db, abs=0.02)
    config = read_json_object(tmp_path / "out" / "unet" / "config.json")["quantization_config"]
    assert (CONFIG_KEY in config) == correction["kept"]
    assert [knot["time"] for knot in correction["knots"]] == [1, 501]
    assert f"noise correction: {correction['says']}" in result.stderr
    assert correction["says"] in (tmp_path / "out" / "report" / "index.html").read_text()


@pytest.mark.slow
def test_quantizing_without_a_correction(float_model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    quantize = ("quantize", float_model, "out", "--level", "calib", "--recipe", "recipe.toml", "--no-noise-correction")
    result = run_here(*quantize, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "correction" not in result.stderr
    assert json.loads((tmp_path / "out" / "report" / "report.json").read_text())["noise_correction"] is None
    assert CONFIG_KEY not in read_json_object(tmp_path / "out" / "unet" / "config.json")["quantization_config"]
