"""Measuring a noise correction, and keeping it only where it helps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from tests.support.program import run_here
from tests.support.small_unet import CPU, RECIPE
from tinysd_batch import TinySD
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.sampling.noise_correction import CONFIG_KEY, Knot, NoiseCorrection, read_correction
from tinysd_batch.quantize.calibration.trajectories import Trajectories, draw
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.evaluate.compare import generate_latents, predict_guided_noise
from tinysd_batch.quantize.evaluate.fit_noise_correction import add_noise_correction, evaluate_correction, fit_knot
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions
from tinysd_batch.quantize.sources.open import open_source

SCALE = 2.0
SEED = 100
SLOPE, BIAS = -0.2, [0.1, 0.0, -0.1, 0.05]


@given(st.floats(-0.5, 0.9), st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0, 0.5), st.integers(0, 99))
def test_what_was_added_is_found(slope: float, bias: list[float], rest: float, seed: int) -> None:
    generator = Generator().manual_seed(seed)
    wanted, errors = (torch.randn(8, 4, 16, 16, generator=generator) for _ in range(2))
    knot = fit_knot(501.0, wanted, (1 + slope) * wanted + torch.tensor(bias).view(-1, 1, 1) + rest * errors)
    assert knot.slope == pytest.approx(slope, abs=0.05)
    assert knot.bias == pytest.approx(bias, abs=0.1)
    assert knot.deviation == pytest.approx(rest / (1 + slope), rel=0.1, abs=1e-4)


def test_without_biases_what_they_took_away_is_still_wrong() -> None:
    wanted = torch.randn(8, 4, 16, 16, generator=Generator().manual_seed(1))
    wanted -= wanted.mean(dim=(0, 2, 3), keepdim=True)
    found = (1 + SLOPE) * wanted + torch.tensor(BIAS).view(-1, 1, 1)
    knot = fit_knot(501.0, wanted, found)
    left = (found / (1 + SLOPE) - wanted).square().mean() ** 0.5
    assert knot.deviation == pytest.approx(0, abs=1e-4)
    assert knot.without_bias().deviation == pytest.approx(float(left), rel=1e-3)


@pytest.mark.parametrize(("spread", "absorbs"), [(1.05, True), (0.95, False)])
def test_noise_is_spared_only_where_drawings_vary_too_much(spread: float, absorbs: bool) -> None:
    wanted = torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(1))
    knots = [Knot(time=1, slope=SLOPE, bias=BIAS, deviation=0.1)]
    judged = evaluate_correction(
        NoiseCorrection(scale=SCALE, knots=knots), lambda one: wanted * (spread if one else 0.5), wanted
    )
    assert judged.is_improvement
    assert judged.correction.absorbs == absorbs
    assert (judged.correction.absorbed_deviation(1) > 0) == absorbs


# A model that is told what the float one says


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture(scope="module")
def drawn(float_model: Path) -> Trajectories:
    recipe = Recipe(prompts=["cat", "dog"], held_out=["lion", "bell"], steps=3, scale=SCALE)
    part = open_source(float_model, SourceOptions()).unet()
    return draw(SegmentedUNet(part.config, part.tensors, CPU), float_model, recipe, recipe.prompts, SEED)


def said_by(model: TinySD, drawn: Trajectories) -> Trajectories:
    """The same trajectories, with the noise that this model predicts there."""
    with torch.no_grad():
        with_text, without = (torch.stack(predict_guided_noise(model, drawn, scale)) for scale in (1.0, 0.0))
    return replace(drawn, noise=with_text, noise_without=without)


def test_a_correction_that_helps_is_kept(folder: Path, drawn: Trajectories) -> None:
    """The float model is the packed one, stretched and moved: undoing that brings pictures all the way."""
    model = TinySD.from_pretrained(folder, device="cpu")
    said, bias = said_by(model, drawn), torch.tensor(BIAS).view(-1, 1, 1)
    told = replace(
        said, noise=(said.noise - bias) / (1 + SLOPE), noise_without=(said.noise_without - bias) / (1 + SLOPE)
    )
    knots = [Knot(time=float(time), slope=SLOPE, bias=BIAS, deviation=0) for time in reversed(drawn.times)]
    model.correction = NoiseCorrection(scale=SCALE, knots=knots)
    told = replace(told, final=generate_latents(model, told, SEED, SCALE)[-1])
    before = read_json_object(folder / "unet" / "config.json")
    judged = add_noise_correction(folder, told, told, SEED, SCALE, CPU)
    assert judged.is_improvement
    assert judged.has_bias
    assert judged.sqnr_db_with > judged.sqnr_db_without + 20
    after = read_json_object(folder / "unet" / "config.json")
    assert read_correction(folder / "unet", 4) == judged.correction
    del after["quantization_config"][CONFIG_KEY]
    assert after == before
    assert TinySD.from_pretrained(folder, device="cpu").correction == judged.correction


def test_a_correction_that_does_not_help_is_not_kept(folder: Path, drawn: Trajectories) -> None:
    """Fitted on trajectories that are stretched, judged on pictures that the packed model draws by itself."""
    model = TinySD.from_pretrained(folder, device="cpu")
    said = said_by(model, drawn)
    stretched = replace(said, noise=1.2 * said.noise, noise_without=1.2 * said.noise_without)
    held = replace(drawn, final=generate_latents(model, drawn, SEED, SCALE)[-1])
    before = (folder / "unet" / "config.json").read_bytes()
    judged = add_noise_correction(folder, stretched, held, SEED, SCALE, CPU)
    assert not judged.is_improvement
    assert judged.sqnr_db_without > judged.sqnr_db_with
    assert (folder / "unet" / "config.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("level", ["calib", "distill"])
def test_quantizing_measures_one_and_says_what_became_of_it(float_model: Path, tmp_path: Path, level: str) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE + "tune_steps = 2\nbatch = 4\n")
    quantize = ("quantize", float_model, "out", "--level", level, "--recipe", "recipe.toml", "--preset", "tiny")
    said = run_here(*quantize, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    found = report["noise_correction"]
    with_db, without_db = (found[f"final_latents_sqnr_db_{which}"] for which in ("with", "without"))
    assert not found["kept"] or with_db > without_db
    assert report["final_latents_sqnr_db"] == pytest.approx(with_db if found["kept"] else without_db, abs=0.02)
    stored = read_json_object(tmp_path / "out" / "unet" / "config.json")["quantization_config"]
    assert (CONFIG_KEY in stored) == found["kept"]
    assert [knot["time"] for knot in found["knots"]] == [1, 501]
    assert f"noise correction: {found['says']}" in said.stderr
    assert found["says"] in (tmp_path / "out" / "report" / "index.html").read_text()


@pytest.mark.slow
def test_quantizing_without_measuring_one(float_model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    quantize = ("quantize", float_model, "out", "--level", "calib", "--recipe", "recipe.toml", "--no-noise-correction")
    said = run_here(*quantize, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "correction" not in said.stderr
    assert json.loads((tmp_path / "out" / "report" / "report.json").read_text())["noise_correction"] is None
    assert CONFIG_KEY not in read_json_object(tmp_path / "out" / "unet" / "config.json")["quantization_config"]
