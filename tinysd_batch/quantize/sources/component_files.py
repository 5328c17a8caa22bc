"""Read one component (UNet, VAE or text encoder) of a diffusers folder: its configuration and its tensors."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import check_text_encoder_config
from tinysd_batch.model.checkpoint.folder import TEXT_ENCODER_CONFIG_KEYS, read_module_config
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent, SourceOptions
from tinysd_batch.quantize.sources.tensor_files import open_tensors

DIFFUSERS_STEM = "diffusion_pytorch_model"
# transformers calls a text encoder's file `model`, and `pytorch_model` if it is a pickle.
WEIGHTS_FILE_STEMS = {"unet": [DIFFUSERS_STEM], "vae": [DIFFUSERS_STEM], "text_encoder": ["model", "pytorch_model"]}
WEIGHTS_FILE_SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
TEXT_MODEL_TYPE_KEYS = ("architectures", "model_type")


def read_component(folder: Path, component: str, options: SourceOptions) -> SourceComponent:
    """Read the configuration of a component's folder and map its tensors.

    Args:
        folder: the component's own folder, such as `model/unet`.
        component: "unet", "vae" or "text_encoder".
        options: decides whether pickles are read.
    """
    weights_path = find_weights_file(folder, component)
    contents = open_tensors(weights_path, allow_pickle=options.allow_pickle)
    if contents.other_names:
        raise ModelError(f"{weights_path}: {contents.other_names[0]!r} is not a tensor")
    config = read_known_settings(folder / "config.json", component)
    return SourceComponent(config, contents.tensors, weights_path, contents.tensors)


def read_known_settings(path: Path, component: str) -> dict[str, Any]:
    """Read the entries of a `config.json` that decide the layers and what they compute.

    Other entries are dropped, because they could name code to be downloaded.
    """
    config = read_json_object(path)
    if component == "text_encoder":
        check_text_encoder_config(config, path)
        return {name: config[name] for name in (*TEXT_MODEL_TYPE_KEYS, *TEXT_ENCODER_CONFIG_KEYS) if name in config}
    model_class = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
    return {"_class_name": model_class.__name__, **read_module_config(path, model_class)}


def find_weights_file(folder: Path, component: str) -> Path:
    """Return the file with a component's weights: safetensors before pickles, full before half precision."""
    for suffix in WEIGHTS_FILE_SUFFIXES:
        for stem in WEIGHTS_FILE_STEMS[component]:
            if (folder / f"{stem}{suffix}").exists():
                return folder / f"{stem}{suffix}"
    if index_files := sorted(folder.glob("*.index*.json")):
        raise ModelError(
            f"{index_files[0]}: weights in several files are not supported; save the model again as one file"
        )
    raise ModelError(f"{folder}: no weights; {WEIGHTS_FILE_STEMS[component][0]}.safetensors was expected")
