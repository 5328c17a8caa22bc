import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.models.packed_files import LAYER, Tensors, damage, drop, put
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE, compute_model_digest, read_model_info
from tinysd_batch.quantize.data_free import quantize_folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{LAYER}.qscale"), rf"tensor {LAYER}.qscale is missing"),
        (drop("conv_in.bias"), r"1 tensors are missing, the first is conv_in.bias"),
        (put(f"{LAYER}.qweight", torch.zeros(3, 3, dtype=torch.uint8)), rf"{LAYER}.qweight is torch.uint8 \[3, 3\]"),
        (put(f"{LAYER}.qmeta", torch.zeros(64, 4)), rf"{LAYER}.qmeta is torch.float32"),
        (put("conv_in.bias", torch.zeros(5)), r"conv_in.bias has shape \[5\], \[32\] was expected"),
        (put("stray", torch.zeros(1)), r"1 unexpected tensors, the first is stray"),
    ],
)
def test_a_damaged_unet_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        TinySD.from_pretrained(damage(tiny_model, tmp_path / "model", change))


def test_a_truncated_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = model / "unet" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        TinySD.from_pretrained(model)


def test_another_quantizers_folder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = model / "unet" / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["quant_method"] = "other"
    config.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="quantized by 'other'"):
        TinySD.from_pretrained(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "no such model"), ("file.safetensors", "single checkpoint"), ("empty", "not a model folder")],
)
def test_paths_that_are_not_model_folders_are_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=message):
        read_model_info(str(tmp_path / path))


def test_the_digest_covers_weights_and_configs_but_not_the_readme(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    before = compute_model_digest(model)
    assert before == compute_model_digest(tiny_model)
    (model / "README.md").write_text("a model")
    assert compute_model_digest(model) == before
    other = damage(tiny_model, tmp_path / "other", put("conv_in.bias", torch.zeros(32)))
    assert compute_model_digest(other) != before


def test_quantizing_to_an_existing_folder_is_refused(float_model: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="exists"):
        quantize_folder(float_model, tiny_model)


def test_a_weight_that_is_not_finite_is_refused_before_writing(float_model: Path, tmp_path: Path) -> None:
    source = damage(float_model, tmp_path / "source", put("conv_out.bias", torch.full((4,), float("nan"))))
    with pytest.raises(ModelError, match=r"conv_out\.bias is not finite"):
        quantize_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
