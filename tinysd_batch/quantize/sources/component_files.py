"""Read one component of a diffusers folder: its configuration and tensors."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import check_text_encoder as check_text_config
from tinysd_batch.model.checkpoint.folder import TEXT_SETTINGS, read_config
from tinysd_batch.model.checkpoint.json_file import read_json
from tinysd_batch.quantize.sources.checkpoint_source import (
    Options,
    Part,
)
from tinysd_batch.quantize.sources.tensor_files import open_tensors

DIFFUSERS_STEM = "diffusion_pytorch_model"

# A text encoder's file is called `model`, or in pickles `pytorch_model`.
STEMS = {"unet": [DIFFUSERS_STEM], "vae": [DIFFUSERS_STEM], "text_encoder": ["model", "pytorch_model"]}

ENDINGS = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")

TEXT_KINDS = ("architectures", "model_type")


def read_part(folder: Path, kind: str, options: Options) -> Part:
    """Configuration and mapped tensors of a part's folder."""
    where = weights_file(folder, kind)
    contents = open_tensors(where, allow_pickle=options.allow_pickle)
    if contents.others:
        raise ModelError(f"{where}: {contents.others[0]!r} is no tensor")
    return Part(known_settings(folder / "config.json", kind), contents.tensors, where, contents.tensors)


def known_settings(path: Path, kind: str) -> dict[str, Any]:
    """What decides the part's layers and what they compute: other entries could name code to be fetched."""
    config = read_json(path)
    if kind == "text_encoder":
        check_text_config(config, path)
        return {name: config[name] for name in (*TEXT_KINDS, *TEXT_SETTINGS) if name in config}
    model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[kind]
    return {"_class_name": model.__name__, **read_config(path, model)}


def weights_file(folder: Path, kind: str) -> Path:
    """The file with a part's weights: safetensors before pickles, full before half precision."""
    for ending in ENDINGS:
        for stem in STEMS[kind]:
            if (folder / f"{stem}{ending}").exists():
                return folder / f"{stem}{ending}"
    if several := sorted(folder.glob("*.index*.json")):
        raise ModelError(f"{several[0]}: weights in several files are not read; save the model again as one file")
    raise ModelError(f"{folder}: no weights; {STEMS[kind][0]}.safetensors was expected")
