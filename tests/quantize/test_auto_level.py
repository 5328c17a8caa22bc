"""The level that is taken where none is named, and how long calibrating is foretold to take."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.support.paths import ROOT
from tests.support.program import run_here
from tests.support.small_unet import RECIPE, small_unet
from tinysd_batch.quantize import auto_level as levels
from tinysd_batch.quantize.auto_level import format_duration
from tinysd_batch.quantize.calibration.resume import open_work_folder
from tinysd_batch.quantize.estimate import memory
from tinysd_batch.quantize.estimate.duration import (
    CalibrationCost,
    ComputeCost,
    DeviceSpeed,
    count_macs,
    count_segment_costs,
    estimate_calibration_cost,
    estimate_layer_costs,
)
from tinysd_batch.quantize.presets import DEFAULT_PRESET, SizeTarget, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent, SourceOptions

XEON = DeviceSpeed(
    macs_per_s=1.85e11, elementwise_ops_per_s=5.7e9, op_calls_per_s=5.5e5
)  # two cores with AVX-512, as `speed_of` found it
# There by `python -m benchmarks.quantize.full_size`; sorts of layers alone, told since, on one core in 245 s.
MEASURED_S = {"drawing": 103.0, "layers": 731.0, "measuring": 186 + 245 / 2}


def level_of(folder: Path) -> str:
    return str(json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]["level"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def test_calib_is_chosen_where_it_is_soon_done(float_model: Path, folder: Path) -> None:
    recipe = read_recipe(folder / "recipe.toml")
    level = levels.choose_level(
        float_model, folder / "out", SourceOptions(), SizeTarget(), recipe, torch.device("cpu"), noise_correction=True
    )
    assert level.name == "calib"
    assert level.reason.startswith("level calib: some ")


@pytest.mark.slow
def test_a_model_that_is_soon_calibrated_is(float_model: Path, folder: Path) -> None:
    said = run_here("quantize", float_model, "out", "--recipe", "recipe.toml", cwd=folder)
    assert said.returncode == 0, said.stderr
    assert said.stderr.startswith("level calib: some ")
    assert "--level fast" in said.stderr.splitlines()[0]
    assert level_of(folder / "out") == "calib"


def test_one_that_would_take_hours_is_not(float_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "MAX_CALIBRATION_S", 0.0)
    said = run_here("quantize", float_model, "out", "--level", "auto", cwd=folder)
    assert said.returncode == 0, said.stderr
    assert said.stderr.startswith("level fast: calib would take some ")
    assert "--level calib" in said.stderr.splitlines()[0]
    assert level_of(folder / "out") == "fast"


def test_where_memory_does_not_suffice_for_calib(
    float_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "get_available_memory_bytes", lambda _: 10_000_000)
    said = run_here("quantize", float_model, "out", cwd=folder)
    assert said.returncode == 0, said.stderr
    assert said.stderr.startswith("level fast, as there is no room for calib: quantizing needs about ")
    assert level_of(folder / "out") == "fast"


@pytest.mark.parametrize("level", ["calib", "distill"])
def test_a_stopped_run_goes_on_with_its_level_whatever_is_foretold(
    level: str, float_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "MAX_CALIBRATION_S", 0.0)
    with open_work_folder(folder / "out", {"source": "", "recipe": {}, "size": {}}) as work:
        work.save_level(level)
    said = run_here("quantize", float_model, "out", "--recipe", "recipe.toml", cwd=folder)
    assert said.stderr.startswith(f"level {level}: {folder / 'out.work'} was begun with it")
    assert "was started with another source" in said.stderr  # so it is that level that goes on


@pytest.fixture(scope="module")
def sd_v1() -> Callable[[Recipe], CalibrationCost]:
    """What is foretold of a model of SD v1's size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
        )  # fmt: skip
    parts = [SourceComponent(dict(one.config), one.state_dict(), Path("here")) for one in (unet, vae)]
    return partial(estimate_calibration_cost, parts[0], parts[1], get_preset_layouts(unet, DEFAULT_PRESET))


def test_what_is_foretold_is_what_it_took_within_a_factor_of_two(sd_v1: Callable[[Recipe], CalibrationCost]) -> None:
    found = sd_v1(read_recipe(ROOT / "benchmarks" / "quantize" / "small_calib.toml"))
    layers = sum(one.duration_s(XEON) for one in found.layers.values())
    foretold = {
        "drawing": found.generation.duration_s(XEON),
        "layers": layers,
        "measuring": found.evaluation.duration_s(XEON),
    }
    for name, seconds in foretold.items():
        assert 0.5 < seconds / MEASURED_S[name] < 2, (name, seconds)
    assert 2 < sd_v1(read_recipe(None)).total.duration_s(XEON) / 3600 < 8  # some four, extrapolated


def test_a_row_through_the_units_is_one_through_the_unet() -> None:
    unet = small_unet()
    with torch.device("meta"), torch.no_grad():
        empty = UNet2DConditionModel.from_config(dict(unet.config))
        whole = count_macs(lambda: empty(torch.empty(1, 4, 16, 16), torch.empty(1), torch.empty(1, 77, 256)))
    part = SourceComponent(dict(unet.config), {}, Path("here"))
    units = count_segment_costs(part, get_preset_layouts(unet, DEFAULT_PRESET))
    assert sum(one.total for one in units.values()) == pytest.approx(whole, rel=0.01)


def test_more_tokens_and_sweeps_take_longer_in_every_layer() -> None:
    unet = small_unet()
    part, layouts = SourceComponent(dict(unet.config), {}, Path("here")), get_preset_layouts(unet, DEFAULT_PRESET)
    few = Recipe(prompts=["a", "b"] * 40, held_out=["c", "d"], tokens=256, sweeps=2)
    many = few.model_copy(update={"tokens": 4096, "sweeps": 4})
    little, much = (estimate_layer_costs(part, layouts, recipe) for recipe in (few, many))
    assert little.keys() == layouts.keys()
    for name in layouts:
        assert little[name].duration_s(XEON) < much[name].duration_s(XEON), name


def test_durations_in_words() -> None:
    assert [format_duration(seconds) for seconds in (45, 240, 5400, 14_400)] == [
        "45 seconds", "4 minutes", "90 minutes", "4 hours",
    ]  # fmt: skip
    assert ComputeCost(1, 2, 3).scaled(2) + ComputeCost(1, 1, 1) == ComputeCost(3, 5, 7)
