"""Convert model folders in old and new layouts without changing a weight."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import ldm_checkpoint
from tests.support.conversion import WEIGHTS_STEMS, check_same, convert
from tests.support.files import write_json
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(published, tmp_path / "folder"))


@pytest.fixture(scope="module")
def published(models: ldm_checkpoint.Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as published in 2022: old names in the text encoder, no `model_index.json`."""
    folder = tmp_path_factory.mktemp("published") / "folder"
    models.unet.save_pretrained(folder / "unet")
    models.vae.save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir()
    write_json(folder / "text_encoder" / "config.json", models.text_encoder.config.to_dict())
    text = {f"text_model.{name}": value.contiguous() for name, value in models.text_encoder.state_dict().items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, folder / "text_encoder" / "model.safetensors")
    return folder


def test_a_folder(folder: Path, models: ldm_checkpoint.Models, tmp_path: Path, no_network: None) -> None:
    assert convert(folder, tmp_path / "model")[-1] == "left out: 1 position ids"
    check_same(tmp_path / "model", models)
    assert TinySD.from_pretrained(tmp_path / "model").info.name == "folder"
    convert(tmp_path / "model", tmp_path / "again", "fp16")
    check_same(tmp_path / "again", models, torch.float16)


def test_a_folder_of_half_precision(folder: Path, models: ldm_checkpoint.Models, tmp_path: Path) -> None:
    for component, stem in WEIGHTS_STEMS.items():
        file = folder / component / f"{stem}.safetensors"
        halves = {name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()}
        save_file(halves, folder / component / f"{stem}.fp16.safetensors")
        file.unlink()
    convert(folder, tmp_path / "model")
    check_same(tmp_path / "model", models, torch.float16)


def test_a_folder_of_pickles_and_old_attention(folder: Path, models: ldm_checkpoint.Models, tmp_path: Path) -> None:
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for component, stem in WEIGHTS_STEMS.items():
        file = folder / component / f"{stem}.safetensors"
        tensors = load_file(file)
        if component == "vae":
            for new_name, old_name in old_names.items():
                tensors = {key.replace(f".{new_name}.", f".{old_name}."): value for key, value in tensors.items()}
        torch.save(tensors, folder / component / f"{'pytorch_' if stem == 'model' else ''}{stem}.bin")
        file.unlink()
    with pytest.raises(ModelError, match="--allow-pickle"):
        convert(folder, tmp_path / "model")
    convert(folder, tmp_path / "model", allow_pickle=True)
    check_same(tmp_path / "model", models)


@pytest.mark.parametrize(
    ("component", "entry", "message"),
    [
        ("unet", {"in_channels": 9}, "Stable Diffusion for inpainting"),
        ("unet", {"cross_attention_dim": 1024}, "Stable Diffusion v2"),
        ("unet", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet", {"_class_name": "ControlNetModel"}, "ControlNet"),
        ("unet", {"quantization_config": {}}, "a packed model: it is quantized already"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block = 1000000000: at most 100"),
        ("unet", {"block_out_channels": "wide"}, "layers|does not fit|expected"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: at most 100"),
        ("scheduler", {"prediction_type": "v_prediction"}, "a model that predicts v"),
        ("scheduler", {"prediction_type": "sample"}, "a model that predicts the image: prediction_type is 'sample'"),
        ("text_encoder", {"hidden_size": None}, "its config.json does not fit: .* expected int, got NoneType"),
        ("text_encoder", {"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    ],
)
def test_folders_of_other_models(
    folder: Path, tmp_path: Path, component: str, entry: dict[str, Any], message: str
) -> None:
    config = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    config.parent.mkdir(exist_ok=True)
    write_json(config, {**(json.loads(config.read_text()) if config.exists() else {}), **entry})
    with pytest.raises(ModelError, match=message):
        convert(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folders_without_a_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in [(tmp_path / "empty", "it has no unet"), (tmp_path / "nowhere", "no such file or folder")]:
        with pytest.raises(ModelError, match=message):
            convert(path, tmp_path / "model")
    shutil.move(folder / "unet" / WEIGHTS_FILE, folder / "unet" / "x.safetensors")
    with pytest.raises(ModelError, match=r"unet: no weights; diffusion_pytorch_model\.safetensors was expected"):
        convert(folder, tmp_path / "model")
