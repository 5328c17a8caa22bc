"""Presets: which layers get how many bits, and how large the file becomes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.tools import run_here
from tinysd_batch.model.info import WEIGHTS
from tinysd_batch.model.packing import BITS
from tinysd_batch.quantize.fast import quantize_folder
from tinysd_batch.quantize.presets import PRESETS, layers_to_pack, sort_of, unet_bytes

MOST_BYTES = {"tiny": 270e6, "default": 300e6, "quality": 420e6}


@pytest.fixture(scope="module")
def sd_v1() -> UNet2DConditionModel:
    """SD v1's UNet, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def test_at_sd_v1s_size_each_preset_is_small_and_larger_than_the_one_before(sd_v1: UNet2DConditionModel) -> None:
    sizes = [unet_bytes(sd_v1, layers_to_pack(sd_v1, preset)) for preset in MOST_BYTES]
    assert all(size <= most for size, most in zip(sizes, MOST_BYTES.values(), strict=True)), sizes
    assert sizes == sorted(sizes)
    assert list(MOST_BYTES) == list(PRESETS)


def test_presets_name_sorts_that_there_are(sd_v1: UNet2DConditionModel) -> None:
    sorts = {sort_of(name) for name in layers_to_pack(sd_v1, "tiny")}
    for preset in PRESETS.values():
        assert set(preset.sorts) <= sorts
        assert set(preset.sorts.values()) <= set(BITS)


def test_in_the_default_projections_have_eight_bits_shortcuts_and_the_outer_level_four(
    sd_v1: UNet2DConditionModel,
) -> None:
    bits = {name: layout.bits for name, layout in layers_to_pack(sd_v1, "default").items()}
    eight = {name for name in bits if name.endswith(("time_emb_proj", "attn2.to_k", "attn2.to_v"))}
    four = {name for name in bits if "conv_shortcut" in name or name.startswith(("down_blocks.0.", "up_blocks.3."))}
    assert len(eight) == 22 + 2 * 16
    assert {bits[name] for name in eight} == {8}
    assert {bits[name] for name in four - eight} == {4}
    assert {bits[name] for name in bits.keys() - eight - four} == {2}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_predicted_size_is_the_files(preset: str, float_model: Path, tmp_path: Path) -> None:
    quantize_folder(float_model, tmp_path / "out", preset)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((float_model / "unet" / "config.json").read_text()))
    size = unet_bytes(unet, layers_to_pack(unet, preset))
    assert (tmp_path / "out" / "unet" / WEIGHTS).stat().st_size == size
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["quantization_config"]
    assert config["preset"] == preset


def test_the_size_is_said_at_the_start_and_unknown_presets_are_refused(float_model: Path, tmp_path: Path) -> None:
    done = run_here("quantize", float_model, "out", "--preset", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "out" / "unet" / WEIGHTS).stat().st_size
    assert done.stderr.splitlines()[0].startswith("unet: packing, preset tiny: ")
    assert done.stderr.splitlines()[0].endswith(f"weights at 2 bits: a file of {size / 1e6:,.1f} MB")
    done = run_here("quantize", float_model, "other", "--preset", "best", cwd=tmp_path)
    assert done.returncode == 2
    assert "--preset best: one of tiny, default, quality was expected" in done.stderr
