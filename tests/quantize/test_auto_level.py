"""The level that `--level auto` chooses, and estimates of how long calibration takes."""

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
from tinysd_batch.quantize import auto_level
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

# Two cores with AVX-512, as `measure_device_speed` measured them.
XEON = DeviceSpeed(macs_per_s=1.85e11, elementwise_ops_per_s=5.7e9, op_calls_per_s=5.5e5)
# Measured there with `python -m benchmarks.quantize.full_size`; sensitivity was measured later, on one core in 245 s.
MEASURED_S = {"generation": 103.0, "layers": 731.0, "evaluation": 186 + 245 / 2}


def read_level(folder: Path) -> str:
    return str(json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]["level"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def test_calib_is_chosen_if_it_is_quick(float_model: Path, folder: Path) -> None:
    recipe = read_recipe(folder / "recipe.toml")
    choice = auto_level.choose_level(
        float_model, folder / "out", SourceOptions(), SizeTarget(), recipe, torch.device("cpu"), noise_correction=True
    )
    assert choice.name == "calib"
    assert choice.reason.startswith("level calib: about ")


@pytest.mark.slow
def test_auto_calibrates_a_model_if_that_is_quick(float_model: Path, folder: Path) -> None:
    result = run_here("quantize", float_model, "out", "--recipe", "recipe.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("level calib: about ")
    assert "--level fast" in result.stderr.splitlines()[0]
    assert read_level(folder / "out") == "calib"


def test_auto_chooses_fast_if_calibration_would_take_hours(
    float_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_level, "MAX_CALIBRATION_S", 0.0)
    result = run_here("quantize", float_model, "out", "--level", "auto", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("level fast: calib would take about ")
    assert "--level calib" in result.stderr.splitlines()[0]
    assert read_level(folder / "out") == "fast"


def test_auto_chooses_fast_if_memory_does_not_suffice_for_calib(
    float_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "get_available_memory_bytes", lambda _: 10_000_000)
    result = run_here("quantize", float_model, "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("level fast, because calib does not fit: quantizing needs ")
    assert read_level(folder / "out") == "fast"


@pytest.mark.parametrize("level", ["calib", "distill"])
def test_a_stopped_run_keeps_its_level_whatever_the_estimate(
    level: str, float_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_level, "MAX_CALIBRATION_S", 0.0)
    with open_work_folder(folder / "out", {"source": "", "recipe": {}, "size": {}}) as work:
        work.save_level(level)
    result = run_here("quantize", float_model, "out", "--recipe", "recipe.toml", cwd=folder)
    assert result.stderr.startswith(f"level {level}: {folder / 'out.work'} was started with it")
    assert "with another source" in result.stderr  # so the run did resume with that level


@pytest.fixture(scope="module")
def sd_v1() -> Callable[[Recipe], CalibrationCost]:
    """The estimate for a model of SD v1's size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    unet_component, vae_component = (
        SourceComponent(dict(model.config), model.state_dict(), Path("here")) for model in (unet, vae)
    )
    layouts = get_preset_layouts(unet, DEFAULT_PRESET)
    return partial(estimate_calibration_cost, unet_component, vae_component, layouts)


def test_estimated_durations_are_within_a_factor_of_two(sd_v1: Callable[[Recipe], CalibrationCost]) -> None:
    cost = sd_v1(read_recipe(ROOT / "benchmarks" / "quantize" / "small_calib.toml"))
    estimated_s = {
        "generation": cost.generation.duration_s(XEON),
        "layers": sum(layer.duration_s(XEON) for layer in cost.layers.values()),
        "evaluation": cost.evaluation.duration_s(XEON),
    }
    for name, seconds in estimated_s.items():
        assert 0.5 < seconds / MEASURED_S[name] < 2, (name, seconds)
    assert 2 < sd_v1(read_recipe(None)).total.duration_s(XEON) / 3600 < 8  # about four hours, extrapolated


def test_the_segments_cost_as_much_as_the_whole_unet() -> None:
    unet = small_unet()
    with torch.device("meta"), torch.no_grad():
        meta_unet = UNet2DConditionModel.from_config(dict(unet.config))
        unet_macs = count_macs(lambda: meta_unet(torch.empty(1, 4, 16, 16), torch.empty(1), torch.empty(1, 77, 256)))
    component = SourceComponent(dict(unet.config), {}, Path("here"))
    segments = count_segment_costs(component, get_preset_layouts(unet, DEFAULT_PRESET))
    assert sum(segment.total for segment in segments.values()) == pytest.approx(unet_macs, rel=0.01)


def test_more_tokens_and_sweeps_take_longer_in_every_layer() -> None:
    unet = small_unet()
    component = SourceComponent(dict(unet.config), {}, Path("here"))
    layouts = get_preset_layouts(unet, DEFAULT_PRESET)
    few = Recipe(prompts=["a", "b"] * 40, held_out=["c", "d"], tokens=256, sweeps=2)
    many = few.model_copy(update={"tokens": 4096, "sweeps": 4})
    low_costs, high_costs = (estimate_layer_costs(component, layouts, recipe) for recipe in (few, many))
    assert low_costs.keys() == layouts.keys()
    for name in layouts:
        assert low_costs[name].duration_s(XEON) < high_costs[name].duration_s(XEON), name


def test_durations_have_the_largest_unit_of_which_there_are_two() -> None:
    durations = [format_duration(seconds) for seconds in (45, 240, 5400, 14_400)]
    assert durations == ["45 seconds", "4 minutes", "90 minutes", "4 hours"]


def test_costs_add_up_and_scale() -> None:
    assert ComputeCost(1, 2, 3).scaled(2) + ComputeCost(1, 1, 1) == ComputeCost(3, 5, 7)
