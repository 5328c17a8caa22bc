"""Presets: which layers get how many bits, and how large the file becomes."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.packed.format import SUPPORTED_BITS, WHOLE_ROW, Layout, to_matrix
from tinysd_batch.quantize.bit_allocation import (
    LayoutCandidate,
    find_best_upgrade,
    list_layout_candidates,
    list_layouts,
    measure_quantization_error,
    select_layouts,
    select_smallest_layouts,
)
from tinysd_batch.quantize.calibration.resume import open_work_folder
from tinysd_batch.quantize.data_free import quantize_folder
from tinysd_batch.quantize.layers import get_layer
from tinysd_batch.quantize.presets import PRESETS, compute_unet_bytes, get_layer_type, get_preset_layouts

ERRORS = (1.4, 1.3, 1.2, 1.0, 0.9, 0.8, 0.1, 0.01)  # of a layer's layout candidates, smallest first
MAX_BYTES = {"tiny": 270e6, "default": 300e6, "quality": 420e6}


@pytest.fixture(scope="module")
def sd_v1() -> UNet2DConditionModel:
    """SD v1's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def test_at_sd_v1s_size_each_preset_is_small_and_larger_than_the_one_before(sd_v1: UNet2DConditionModel) -> None:
    sizes = [compute_unet_bytes(sd_v1, get_preset_layouts(sd_v1, preset)) for preset in MAX_BYTES]
    assert all(size <= max_bytes for size, max_bytes in zip(sizes, MAX_BYTES.values(), strict=True)), sizes
    assert sizes == sorted(sizes)
    assert list(MAX_BYTES) == list(PRESETS)


def test_presets_only_name_existing_layer_types(sd_v1: UNet2DConditionModel) -> None:
    layer_types = {get_layer_type(name) for name in get_preset_layouts(sd_v1, "tiny")}
    for preset in PRESETS.values():
        assert set(preset.bits_by_layer_type) <= layer_types
        assert set(preset.bits_by_layer_type.values()) <= set(SUPPORTED_BITS)


def test_the_default_preset_gives_projections_8_bits_and_shortcuts_and_the_outer_level_4(
    sd_v1: UNet2DConditionModel,
) -> None:
    bits = {name: layout.bits for name, layout in get_preset_layouts(sd_v1, "default").items()}
    projections = {name for name in bits if name.endswith(("time_emb_proj", "attn2.to_k", "attn2.to_v"))}
    outer_prefixes = ("down_blocks.0.", "up_blocks.3.")
    shortcuts_and_outer = {name for name in bits if "conv_shortcut" in name or name.startswith(outer_prefixes)}
    assert len(projections) == 22 + 2 * 16
    assert {bits[name] for name in projections} == {8}
    assert {bits[name] for name in shortcuts_and_outer - projections} == {4}
    assert {bits[name] for name in bits.keys() - projections - shortcuts_and_outer} == {2}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_computed_size_is_that_of_the_file(preset: str, float_model: Path, tmp_path: Path) -> None:
    quantize_folder(float_model, tmp_path / "out", preset)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((float_model / "unet" / "config.json").read_text()))
    size = compute_unet_bytes(unet, get_preset_layouts(unet, preset))
    assert (tmp_path / "out" / "unet" / WEIGHTS_FILE).stat().st_size == size
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["quantization_config"]
    assert config["preset"] == preset


def test_the_size_is_printed_at_the_start(float_model: Path, tmp_path: Path) -> None:
    result = run_here("quantize", float_model, "out", "--level", "fast", "--preset", "tiny", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    size = (tmp_path / "out" / "unet" / WEIGHTS_FILE).stat().st_size
    assert result.stderr.splitlines()[0].startswith("unet: packing, preset tiny: ")
    assert result.stderr.splitlines()[0].endswith(f"weights at 2 bits: a file of {size / 1e6:,.1f} MB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "best"), "--preset best: one of tiny, default, quality was expected"),
        (("--preset", "tiny", "--target-size", "1MB"), "use only one of them"),
        (("--target-size", "small"), "--target-size = 'small': give bytes"),
        (("--target-size", "20kB"), r"--target-size 0.0 MB: for this UNet at least 0.\d MB are needed"),
    ],
)
def test_invalid_sizes_are_refused_before_any_work(
    float_model: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run_here("quantize", float_model, "out", "--level", "fast", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert not list(tmp_path.iterdir())


# Target sizes


def test_a_target_size_is_used_up_and_recorded(float_model: Path, tmp_path: Path) -> None:
    target_bytes = 480_000
    result = run_here("quantize", float_model, "out", "--level", "fast", "--target-size", target_bytes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 0.98 * target_bytes < (tmp_path / "out" / "unet" / WEIGHTS_FILE).stat().st_size <= target_bytes
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["quantization_config"]
    assert config["target_size"] == target_bytes
    assert {layer["bits"] for layer in config["layers"].values()} == {2, 4, 8}
    TinySD.from_pretrained(tmp_path / "out", device="cpu")


@given(st.integers(222, 500))
@settings(max_examples=2)
def test_selected_layouts_stay_within_the_target_and_never_add_error(
    sd_v1: UNet2DConditionModel, megabytes: int
) -> None:
    generator = random.Random(megabytes)
    candidates = {
        name: [
            LayoutCandidate(layout, layout.nbytes(*shape), error * generator.random())
            for layout, error in zip(list_layouts(shape[1]), ERRORS[-len(list_layouts(shape[1])) :], strict=True)
        ]
        for name in get_preset_layouts(sd_v1, "tiny")
        if (shape := to_matrix(get_layer(sd_v1, name).weight).shape)
    }
    layouts = select_layouts(sd_v1, candidates, megabytes * 10**6)
    size = compute_unet_bytes(sd_v1, layouts)
    assert size <= megabytes * 10**6
    assert size > 0.99 * min(megabytes * 10**6, 480e6)
    for name, layout in layouts.items():
        (error,) = (candidate.error for candidate in candidates[name] if candidate.layout == layout)
        assert error <= candidates[name][0].error


def test_the_smallest_file_has_one_scale_per_row_except_in_layers_that_are_split(sd_v1: UNet2DConditionModel) -> None:
    unsplit, split = (select_smallest_layouts(sd_v1, max_columns) for max_columns in (None, 11_520))
    assert {layout.group_size for layout in unsplit.values()} == {WHOLE_ROW}
    wide_layers = {name for name in unsplit if to_matrix(get_layer(sd_v1, name).weight).shape[1] > 11_520}
    assert len(wide_layers) == 7
    assert {name for name, layout in split.items() if layout == Layout(2, 64)} == wide_layers
    assert [round(compute_unet_bytes(sd_v1, layouts) / 1e6) for layouts in (unsplit, split)] == [221, 226]


def test_layers_that_gain_most_per_byte_are_upgraded_first() -> None:
    shortcut, deep = "up_blocks.3.resnets.0.conv_shortcut", "mid_block.resnets.0.conv1"
    generator = torch.Generator().manual_seed(0)
    gains = []
    for name, shape in ((shortcut, (320, 960)), (deep, (1280, 11_520))):
        candidates = list_layout_candidates(name, 4, torch.randn(shape, generator=generator), None)
        upgrade = find_best_upgrade(name, candidates, 0)
        assert upgrade is not None
        gains.append(upgrade[0])
    assert gains[0] < gains[1]


def test_output_errors_depend_only_on_columns_with_inputs() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(4, 64)
    x[:, :32] = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    weight[:, 32:] *= 100  # in groups of their own
    expected = measure_quantization_error(weight[:, :32], Layout(2, 32), x[:, :32])
    assert measure_quantization_error(weight, Layout(2, 32), x) == pytest.approx(expected, rel=0.05)
    assert measure_quantization_error(weight, Layout(2, 64), x) > 10 * expected


def test_a_resumed_run_keeps_its_layouts(tmp_path: Path) -> None:
    layouts = {"a": Layout(4, 64), "b": Layout(2, 16)}
    with open_work_folder(tmp_path / "out", {}) as work:
        assert work.load_or_choose_layouts(lambda: layouts) == layouts
    with open_work_folder(tmp_path / "out", {}) as work:
        assert work.load_or_choose_layouts(lambda: {"a": Layout(8, 64)}) == layouts
