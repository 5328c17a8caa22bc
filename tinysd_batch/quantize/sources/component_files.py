"""Read one component of a diffusers folder: its configuration and tensors."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import check_text_encoder_config as check_text_config
from tinysd_batch.model.checkpoint.folder import TEXT_ENCODER_CONFIG_KEYS, read_module_config
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
    SourceOptions,
)
from tinysd_batch.quantize.sources.tensor_files import open_tensors

DIFFUSERS_STEM = "diffusion_pytorch_model"

# A text encoder's file is called `model`, or in pickles `pytorch_model`.
WEIGHTS_FILE_STEMS = {"unet": [DIFFUSERS_STEM], "vae": [DIFFUSERS_STEM], "text_encoder": ["model", "pytorch_model"]}

WEIGHTS_FILE_SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")

TEXT_MODEL_TYPE_KEYS = ("architectures", "model_type")


def read_component(folder: Path, kind: str, options: SourceOptions) -> SourceComponent:
    """Configuration and mapped tensors of a part's folder."""
    where = find_weights_file(folder, kind)
    contents = open_tensors(where, allow_pickle=options.allow_pickle)
    if contents.other_names:
        raise ModelError(f"{where}: {contents.other_names[0]!r} is no tensor")
    return SourceComponent(read_known_settings(folder / "config.json", kind), contents.tensors, where, contents.tensors)


def read_known_settings(path: Path, kind: str) -> dict[str, Any]:
    """What decides the part's layers and what they compute: other entries could name code to be fetched."""
    config = read_json_object(path)
    if kind == "text_encoder":
        check_text_config(config, path)
        return {name: config[name] for name in (*TEXT_MODEL_TYPE_KEYS, *TEXT_ENCODER_CONFIG_KEYS) if name in config}
    model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[kind]
    return {"_class_name": model.__name__, **read_module_config(path, model)}


def find_weights_file(folder: Path, kind: str) -> Path:
    """The file with a part's weights: safetensors before pickles, full before half precision."""
    for ending in WEIGHTS_FILE_SUFFIXES:
        for stem in WEIGHTS_FILE_STEMS[kind]:
            if (folder / f"{stem}{ending}").exists():
                return folder / f"{stem}{ending}"
    if several := sorted(folder.glob("*.index*.json")):
        raise ModelError(f"{several[0]}: weights in several files are not read; save the model again as one file")
    raise ModelError(f"{folder}: no weights; {WEIGHTS_FILE_STEMS[kind][0]}.safetensors was expected")
