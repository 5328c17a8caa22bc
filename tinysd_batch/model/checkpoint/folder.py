"""Model folders: diffusers' layout, with a UNet that may be packed. Reads and writes safetensors only, never a pickle.

A packed UNet's `config.json` carries a `quantization_config` that lists every packed layer with its shape, so that a
damaged or mixed-up file fails by name instead of drawing noise.
"""

import inspect
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import (
    BETA_KEYS,
    check_scheduler_config,
    check_text_encoder_config,
    check_unet_config,
    check_vae_config,
)
from tinysd_batch.model.checkpoint.config_rules import format_config_value, is_positive_int
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.checkpoint.safetensors_mmap import MappedTensors, write_safetensors
from tinysd_batch.model.nn.vae_decoder import use_strip_layers
from tinysd_batch.model.packed.format import Layout, PackedWeight
from tinysd_batch.model.packed.layers import swap_packed_layers
from tinysd_batch.storage.atomic import write_atomically
from tinysd_batch.text import excerpt

PIPELINE_INDEX = "model_index.json"
TEXT_ENCODER_WEIGHTS_FILE = "model.safetensors"
QUANT_METHOD = "tinysd"
FORMAT_VERSION = "1.0"
MAX_REASON_CHARACTERS = 200  # characters of a library's message
META_DEVICE = torch.device("meta")
# All that decides what a text encoder computes. Others could name code to be fetched from elsewhere.
TEXT_ENCODER_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


@contextmanager
def wrap_as_model_error(config: Path, fault: str = "no model can be built from it") -> Iterator[None]:
    """Whatever a stranger's configuration makes a constructor do becomes a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries do not say what they raise
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise ModelError(f"{config}: {fault}: {type(error).__name__}: {reason}") from None


def read_module_config(path: Path, model: type[nn.Module]) -> dict[str, Any]:
    """What a class of diffusers takes out of a `config.json`, and no more. Raises ModelError as `supported` does."""
    known = inspect.signature(model.__init__).parameters
    config = read_json_object(path)
    check = check_unet_config if model is UNet2DConditionModel else check_vae_config
    check(config, path)
    return {name: value for name, value in config.items() if name in known and name != "self"}


# The UNet


def read_layouts(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> dict[str, Layout]:
    """The packed layers that the configuration lists; raise ModelError naming a tensor that does not fit."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    described = where.with_name("config.json")
    check_quantization_format(quantization, described)
    layouts = parse_layouts(quantization, described)
    for name, layout in layouts.items():
        rows, *inner = quantization["layers"][name]["shape"]
        with name_layer_in_error(name, described):
            expected = layout.tensors(rows, math.prod(inner))
        for part, (dtype, shape) in expected.items():
            if f"{name}.{part}" not in tensors:
                raise ModelError(f"{where}: tensor {name}.{part} is missing")
            check_tensor(f"{name}.{part}", tensors[f"{name}.{part}"], dtype, shape, where)
    return layouts


def parse_layouts(quantization: Mapping[str, Any], where: Path) -> dict[str, Layout]:
    """How each packed layer is stored. Raises ModelError for ways that there are not."""
    layers = quantization.get("layers")
    if not isinstance(layers, dict):
        raise ModelError(
            f"{where}: quantization_config: layers = {format_config_value(layers)}: an object was expected"
        )
    layouts = {}
    for name, entry in layers.items():
        with name_layer_in_error(name, where):
            if not isinstance(entry, dict):
                raise ModelError(f"{format_config_value(entry)}: an object was expected")
            shape = entry.get("shape")
            if not isinstance(shape, list) or len(shape) not in (2, 4) or not all(map(is_positive_int, shape)):
                raise ModelError(f"shape = {format_config_value(shape)}: a list of 2 or 4 whole numbers was expected")
            layouts[name] = Layout.from_config_entry(entry)
    return layouts


def check_packed_layer_names(unet: nn.Module, names: Collection[str], where: Path) -> None:
    """Raise ModelError where a name is not that of a layer of the UNet that can be packed."""
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if unknown := sorted(set(names) - layers):
        raise ModelError(
            f"{where}: quantization_config names {len(unknown)} layers that this UNet does not have, the first is "
            f"{excerpt(unknown[0])}"
        )


@contextmanager
def name_layer_in_error(name: str, where: Path) -> Iterator[None]:
    """Say of a ModelError which layer of which file it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{where}: layer {excerpt(name)}: {error}") from None


def check_quantization_format(quantization: Any, where: Path) -> None:
    """Raise ModelError unless this is our format, in a version that this program reads."""
    if not isinstance(quantization, dict):
        raise ModelError(f"{where}: quantization_config = {format_config_value(quantization)}: an object was expected")
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ModelError(
            f"{where}: quantized by {quantization.get('quant_method')!r}, which this program does not read"
        )
    if str(quantization.get("min_reader", FORMAT_VERSION)).split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise ModelError(
            f"{where}: format {quantization['min_reader']} is newer than {FORMAT_VERSION}; update tinysd-batch"
        )


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], where: Path) -> None:
    """Raise ModelError where type or shape is wrong."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ModelError(
            f"{where}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, {dtype} {list(shape)} was expected"
        )


def read_unet(folder: Path) -> tuple[UNet2DConditionModel, MappedTensors]:
    """The UNet on the meta device, packed layers swapped in, and the file's tensors, mapped, that fill it.

    Raises ModelError for any tensor that is missing, unexpected or of the wrong shape.
    """
    where = folder / WEIGHTS_FILE
    tensors = MappedTensors.read(where)
    with wrap_as_model_error(folder / "config.json"), META_DEVICE:
        unet = UNet2DConditionModel.from_config(read_module_config(folder / "config.json", UNet2DConditionModel))
    layouts = read_layouts(read_json_object(folder / "config.json"), tensors, where)
    check_packed_layer_names(unet, layouts, folder / "config.json")
    with wrap_as_model_error(folder / "config.json"):
        swap_packed_layers(unet, layouts)
    check_tensor_names(unet, tensors, where)
    return unet.eval(), tensors


def check_tensor_names(module: nn.Module, tensors: Collection[str], where: Path) -> None:
    """Raise ModelError unless these are the names of the module's tensors."""
    expected = set(module.state_dict())
    if missing := sorted(expected - set(tensors)):
        raise ModelError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unexpected := sorted(set(tensors) - expected):
        raise ModelError(f"{where}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}")


def write_packed_unet(
    folder: Path, config: Mapping[str, Any], packed: Mapping[str, tuple[PackedWeight, tuple[int, ...]]],
    others: Mapping[str, Tensor], notes: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write `config.json` and weights of a packed UNet. `packed` gives each layer's weight and original shape."""
    layers = {name: weight.layout.to_config_entry(shape) for name, (weight, shape) in sorted(packed.items())}
    quantization = {
        "quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "min_reader": FORMAT_VERSION,
        "layout": "tap-major", **notes, "layers": layers,
    }  # fmt: skip
    tensors = dict(others)
    for name, (weight, _) in packed.items():
        tensors |= {f"{name}.{part}": value for part, value in weight.tensors().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        folder / WEIGHTS_FILE, tensors, {name: one.dtype for name, one in tensors.items()}, tensors.__getitem__
    )
    content = json.dumps({**config, "quantization_config": quantization}, indent=2)
    write_atomically((content + "\n").encode(), folder / "config.json")


def write_pipeline_index(folder: Path, **parts: list[str]) -> None:
    """Write `model_index.json`, by which diffusers loads the folder as a pipeline. `parts` are unlike SD v1's own."""
    scheduler = read_json_object(folder / "scheduler" / "scheduler_config.json").get("_class_name", "PNDMScheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers_version,
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], **parts,
    }  # fmt: skip
    write_atomically((json.dumps(index, indent=2) + "\n").encode(), folder / PIPELINE_INDEX)


# Text encoder and autoencoder


def read_text_encoder(folder: Path) -> tuple[CLIPTextModel, MappedTensors]:
    """The text encoder on the meta device and the file's tensors."""
    where = folder / TEXT_ENCODER_WEIGHTS_FILE
    config = read_json_object(folder / "config.json")
    check_text_encoder_config(config, folder / "config.json")
    with wrap_as_model_error(folder / "config.json"), META_DEVICE:
        encoder = CLIPTextModel(
            CLIPTextConfig(**{name: config[name] for name in TEXT_ENCODER_CONFIG_KEYS if name in config})
        )
    # Files of transformers before 5 keep the tower one name further down.
    tensors = MappedTensors.read(where)
    tensors.rename(lambda name: name.removeprefix("text_model."))
    tensors.pop("embeddings.position_ids", None)
    check_tensor_names(encoder, tensors, where)
    tensors.update(
        {name: make_position_ids(value) for name, value in encoder.named_buffers() if name.endswith("position_ids")}
    )
    return encoder.eval(), tensors


def make_position_ids(like: Tensor) -> Tensor:
    """0, 1, 2, ... in the shape of CLIP's position_ids, which no file stores."""
    return torch.arange(like.shape[-1]).expand(like.shape).clone()


def read_vae_decoder(folder: Path) -> tuple[AutoencoderKL, MappedTensors]:
    """The autoencoder without its encoder, on the meta device, and the file's tensors."""
    where = folder / WEIGHTS_FILE
    with wrap_as_model_error(folder / "config.json"), META_DEVICE:
        vae = AutoencoderKL.from_config(read_module_config(folder / "config.json", AutoencoderKL))
    tensors = MappedTensors.read(where)
    if any(name.startswith("encoder.") for name in tensors):
        check_tensor_names(vae, tensors, where)
    vae.encoder = vae.quant_conv = None
    use_strip_layers(vae)
    tensors.rename(lambda name: None if name.startswith(("encoder.", "quant_conv.")) else name)
    check_tensor_names(vae, tensors, where)
    return vae.eval(), tensors


def read_noise_schedule(path: Path) -> dict[str, Any]:
    """The noise schedule of `scheduler_config.json`: beta_start, beta_end and beta_schedule."""
    config = read_json_object(path)
    check_scheduler_config(config, path)
    return {name: config[name] for name in BETA_KEYS}
