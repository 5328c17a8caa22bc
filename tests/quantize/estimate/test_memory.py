"""Estimates of memory and disk space, and checks against what is available."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.support.models.small_unet import CPU, RECIPE, small_unet
from tests.support.paths import ROOT
from tests.support.program import run_here
from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.quantize.calibrated import make_state_pairs
from tinysd_batch.quantize.calibration.layerwise import DataSplit, LayerwiseCalibration, StatePair
from tinysd_batch.quantize.calibration.trajectories import UNetInputs
from tinysd_batch.quantize.calibration.unet_segments import SegmentedUNet
from tinysd_batch.quantize.estimate import memory
from tinysd_batch.quantize.estimate.memory import (
    SegmentMemory,
    choose_state_dtype,
    count_unet_inputs,
    estimate_calibration_bytes,
    estimate_unet_file_bytes,
    largest_state_floats,
    trace_segment_memory,
)
from tinysd_batch.quantize.presets import SizeTarget, get_preset_layouts
from tinysd_batch.quantize.recipe import Recipe, read_recipe
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent


def test_too_little_memory_is_an_error_with_needed_and_available(
    float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.setattr(memory, "get_available_memory_bytes", lambda _: 300_000)
    for options, advice in (
        (("--level", "fast"), ""),
        (("--level", "calib", "--recipe", "recipe.toml"), "fewer prompts"),
    ):
        done = run_here("quantize", float_model, "out", *options, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert re.search(rf"quantizing needs about \d+ MB of memory, 0 MB are available.*{advice}", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_too_little_disk_space_is_an_error_with_needed_and_free(
    float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = run_here("quantize", float_model, "out", "--level", "fast", cwd=tmp_path)
    assert done.returncode == 5
    assert re.search(r"out: needs about 1 MB of disk space, 0 MB are free", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sd_v1() -> SourceComponent:
    """Return SD v1's UNet without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return SourceComponent(dict(unet.config), {}, Path("nowhere"))


@pytest.fixture(scope="module")
def sd_v1_segments(sd_v1: SourceComponent) -> list[SegmentMemory]:
    return trace_segment_memory(sd_v1)


def test_states_of_sd_v1_are_stored_as_float16(
    sd_v1: SourceComponent, sd_v1_segments: list[SegmentMemory], tmp_path: Path
) -> None:
    recipe = read_recipe(None)
    assert choose_state_dtype(sd_v1, recipe) is torch.float16
    assert 2 * count_unet_inputs(recipe) * 2 * largest_state_floats(sd_v1_segments) < 5e9
    small = SourceComponent(dict(small_unet().config), {}, tmp_path)
    assert choose_state_dtype(small, recipe) is torch.float32


def test_calibration_takes_the_estimated_memory(tmp_path: Path) -> None:
    """Layers are solved in several column blocks, and there are more inputs than one batch."""
    unet = small_unet().eval()
    component = SourceComponent(dict(unet.config), unet.state_dict(), tmp_path)
    recipe = Recipe(prompts=["a"] * 40, held_out=["b"] * 4, points=2, tokens=1024, sweeps=2, block=320)
    generator = torch.Generator().manual_seed(0)

    def random_pairs(count: int, split: DataSplit) -> list[StatePair]:
        latents, context = (torch.randn(count, *shape, generator=generator) for shape in ((4, 16, 16), (8, 256)))
        inputs = UNetInputs(latents, torch.full((count,), 500.0), context)
        return list(make_state_pairs(inputs, CPU, split, torch.float32))

    # Only the segment with the largest estimate is calibrated.
    layouts = {
        name: layout
        for name, layout in get_preset_layouts(unet, "tiny").items()
        if name.startswith("up_blocks.1.resnets.0")
    }
    float_unet, quantized_unet = (SegmentedUNet(component.config, component.tensors, CPU) for _ in range(2))
    with PeakMemoryTracker() as tracker:
        tracker.exclude(component.tensors.values())
        pairs = [*random_pairs(140, "moments"), *random_pairs(20, "tuning"), *random_pairs(8, "held out")]
        LayerwiseCalibration(float_unet, quantized_unet, layouts, recipe, {}, lambda *_: None).run(pairs)
    estimated = estimate_calibration_bytes(component, trace_segment_memory(component), recipe)
    estimated += estimate_unet_file_bytes(unet, SizeTarget("tiny"))
    assert 0.6 * estimated < tracker.peak_bytes < 1.1 * estimated


def test_small_recipe_for_sd_v1_takes_less_than_three_gigabytes(
    sd_v1: SourceComponent, sd_v1_segments: list[SegmentMemory]
) -> None:
    recipe = read_recipe(ROOT / "benchmarks" / "quantize" / "small_calib.toml")
    assert 2e9 < estimate_calibration_bytes(sd_v1, sd_v1_segments, recipe) < 3e9
