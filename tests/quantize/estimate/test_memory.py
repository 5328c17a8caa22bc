"""Memory and disk are asked for before work starts."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.support.paths import ROOT
from tests.support.program import run_here
from tests.support.small_unet import RECIPE, small_unet
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors
from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.quantize.calibrated import make_state_pairs
from tinysd_batch.quantize.calibration.layerwise import DataSplit, LayerwiseCalibration, StatePair, run_segment
from tinysd_batch.quantize.calibration.trajectories import UNetInputs
from tinysd_batch.quantize.calibration.unet_segments import ForwardState, SegmentedUNet
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

CPU = torch.device("cpu")
SMAPS = Path("/proc/self/smaps")


def test_too_little_memory_is_said_with_need_and_have(
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


def test_too_small_a_disk_is_said_with_need_and_have(
    float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = run_here("quantize", float_model, "out", "--level", "fast", cwd=tmp_path)
    assert done.returncode == 5
    assert re.search(r"out: needs about 1 MB of disk space, 0 MB are free", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sd_v1() -> SourceComponent:
    """SD v1's UNet, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return SourceComponent(dict(unet.config), {}, Path("nowhere"))


@pytest.fixture(scope="module")
def places(sd_v1: SourceComponent) -> list[SegmentMemory]:
    return trace_segment_memory(sd_v1)


def test_at_sd_v1s_size_rows_wait_as_float16(
    sd_v1: SourceComponent, places: list[SegmentMemory], tmp_path: Path
) -> None:
    recipe = read_recipe(None)
    assert choose_state_dtype(sd_v1, recipe) is torch.float16
    assert 2 * count_unet_inputs(recipe) * 2 * largest_state_floats(places) < 5e9
    small = SourceComponent(dict(small_unet().config), {}, tmp_path)
    assert choose_state_dtype(small, recipe) is torch.float32


def test_calibrating_takes_the_tensors_that_are_foretold(tmp_path: Path) -> None:
    """With layers that are solved in parts, and more rows than pass a unit together."""
    unet = small_unet().eval()
    part = SourceComponent(dict(unet.config), unet.state_dict(), tmp_path)
    recipe = Recipe(prompts=["a"] * 40, held_out=["b"] * 4, points=2, tokens=1024, sweeps=2, block=320)
    draw = torch.Generator().manual_seed(0)

    def rows(count: int, use: DataSplit) -> list[StatePair]:
        latents, context = (torch.randn(count, *shape, generator=draw) for shape in ((4, 16, 16), (8, 256)))
        return list(
            make_state_pairs(UNetInputs(latents, torch.full((count,), 500.0), context), CPU, use, torch.float32)
        )

    # Of the unit where most is foretold; the others' layers are passed as floats.
    layouts = {
        name: one for name, one in get_preset_layouts(unet, "tiny").items() if name.startswith("up_blocks.1.resnets.0")
    }
    source, target = (SegmentedUNet(part.config, part.tensors, CPU) for _ in range(2))
    with PeakMemoryTracker() as live:
        live.exclude(part.tensors.values())
        some = [*rows(140, "moments"), *rows(20, "tuning"), *rows(8, "held out")]
        LayerwiseCalibration(source, target, layouts, recipe, {}, lambda *_: None).run(some)
    foretold = estimate_calibration_bytes(part, trace_segment_memory(part), recipe) + estimate_unet_file_bytes(
        unet, SizeTarget("tiny")
    )
    assert 0.6 * foretold < live.peak_bytes < 1.1 * foretold


def test_at_sd_v1s_size_a_small_recipe_takes_under_three_gigabytes(
    sd_v1: SourceComponent, places: list[SegmentMemory]
) -> None:
    recipe = read_recipe(ROOT / "benchmarks" / "quantize" / "small_calib.toml")
    assert 2e9 < estimate_calibration_bytes(sd_v1, places, recipe) < 3e9


def test_waiting_as_float16_changes_little() -> None:
    unet = small_unet().eval()
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 5, 256)))
    walker = SegmentedUNet(unet.config, unet.state_dict(), CPU)
    said = []
    for dtype in (torch.float32, torch.float16):
        state = ForwardState.from_inputs(latents, torch.tensor([1.0, 900.0]), context)
        with torch.no_grad():
            for unit in walker.segments:
                walker.load(unit)
                state = run_segment(unit, walker.unet, state, dtype)
                assert {one.dtype for one in (state.hidden_states, *state.skips)} == {dtype}
        said.append(state.hidden_states.float())
    error = (said[0] - said[1]).square().sum() / said[0].square().sum()
    assert 0 < error < 1e-5


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what of files is in memory")
def test_what_was_read_of_the_float_model_leaves_memory_again(tmp_path: Path) -> None:
    unet = small_unet().eval()
    unet.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / WEIGHTS_FILE
    tensors = MappedTensors.read(file)
    walker = SegmentedUNet(unet.config, tensors, CPU, tensors.release)
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 256)
    expected = unet(latents, 500, context).sample
    assert torch.allclose(walker.predict(latents, torch.full((2,), 500.0), context, 2), expected, atol=1e-4)
    assert resident_bytes(file) < file.stat().st_size / 10
    assert sum(float(one.sum()) for one in tensors.values())
    assert resident_bytes(file) > file.stat().st_size / 2  # so the figure means something


def resident_bytes(file: Path) -> int:
    """What of a file's mapping is in this process's memory."""
    _, _, run_segment = SMAPS.read_text().partition(str(file))
    return int(run_segment.partition("Rss:")[2].split()[0]) * 1024
