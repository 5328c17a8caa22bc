"""Read and write model folders: diffusers' layout, with a UNet that may be packed. Safetensors only, never pickles.

The `config.json` of a packed UNet has a `quantization_config` that lists every packed layer with its shape. So a
damaged or mixed-up file fails with the name of the tensor instead of generating noise.
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
MAX_REASON_CHARACTERS = 200  # of a library's error message
META_DEVICE = torch.device("meta")
# All entries that affect what a text encoder computes. Other entries could make transformers download code.
TEXT_ENCODER_CONFIG_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


@contextmanager
def wrap_as_model_error(path: Path, problem: str = "no model can be built from it") -> Iterator[None]:
    """Convert any exception to a ModelError: libraries raise all kinds for an untrusted configuration."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries do not document what they raise
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise ModelError(f"{path}: {problem}: {type(error).__name__}: {reason}") from None


def read_module_config(path: Path, module_type: type[nn.Module]) -> dict[str, Any]:
    """Read the entries of a `config.json` that the constructor of a diffusers class takes.

    Raises:
        ModelError: a value is not supported; see `config_checks`.
    """
    parameters = inspect.signature(module_type.__init__).parameters
    config = read_json_object(path)
    check = check_unet_config if module_type is UNet2DConditionModel else check_vae_config
    check(config, path)
    return {name: value for name, value in config.items() if name in parameters and name != "self"}


# The UNet


def read_layouts(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Layout]:
    """Return the layouts of the packed layers that the configuration lists.

    Args:
        config: the UNet's `config.json`.
        tensors: the tensors of its weights file.
        path: the weights file, for error messages.

    Raises:
        ModelError: a tensor is missing, or has another type or shape than its layout.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    config_path = path.with_name("config.json")
    check_quantization_format(quantization, config_path)
    layouts = parse_layouts(quantization, config_path)
    for layer, layout in layouts.items():
        rows, *inner = quantization["layers"][layer]["shape"]
        with name_layer_in_error(layer, config_path):
            expected = layout.tensors(rows, math.prod(inner))
        for leaf, (dtype, shape) in expected.items():
            name = f"{layer}.{leaf}"
            if name not in tensors:
                raise ModelError(f"{path}: tensor {name} is missing")
            check_tensor(name, tensors[name], dtype, shape, path)
    return layouts


def parse_layouts(quantization: Mapping[str, Any], path: Path) -> dict[str, Layout]:
    """Parse the layout of each packed layer. Raises ModelError for an invalid or unknown layout."""
    layers = quantization.get("layers")
    if not isinstance(layers, dict):
        raise ModelError(f"{path}: quantization_config: layers = {format_config_value(layers)}: an object was expected")
    layouts = {}
    for name, entry in layers.items():
        with name_layer_in_error(name, path):
            if not isinstance(entry, dict):
                raise ModelError(f"{format_config_value(entry)}: an object was expected")
            shape = entry.get("shape")
            if not isinstance(shape, list) or len(shape) not in (2, 4) or not all(map(is_positive_int, shape)):
                raise ModelError(f"shape = {format_config_value(shape)}: a list of 2 or 4 whole numbers was expected")
            layouts[name] = Layout.from_config_entry(entry)
    return layouts


def check_packed_layer_names(unet: nn.Module, names: Collection[str], path: Path) -> None:
    """Raise ModelError if a name is not that of a linear or convolution layer of the UNet."""
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if unknown := sorted(set(names) - layers):
        raise ModelError(
            f"{path}: quantization_config names {len(unknown)} layers that this UNet does not have, the first is "
            f"{excerpt(unknown[0])}"
        )


@contextmanager
def name_layer_in_error(name: str, path: Path) -> Iterator[None]:
    """Add file and layer to the message of a ModelError."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: layer {excerpt(name)}: {error}") from None


def check_quantization_format(quantization: Any, path: Path) -> None:
    """Raise ModelError unless this is our format, in a version that this program reads."""
    if not isinstance(quantization, dict):
        raise ModelError(f"{path}: quantization_config = {format_config_value(quantization)}: an object was expected")
    if quantization.get("quant_method") != QUANT_METHOD:
        raise ModelError(f"{path}: quantized by {quantization.get('quant_method')!r}, which this program does not read")
    if str(quantization.get("min_reader", FORMAT_VERSION)).split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise ModelError(
            f"{path}: format {quantization['min_reader']} is newer than {FORMAT_VERSION}; update tinysd-batch"
        )


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], path: Path) -> None:
    """Raise ModelError if a tensor's type or shape is wrong."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ModelError(
            f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, {dtype} {list(shape)} was expected"
        )


def read_unet(folder: Path) -> tuple[UNet2DConditionModel, MappedTensors]:
    """Return the UNet on the meta device, with packed layers in place, and the mapped tensors of its file.

    Raises:
        ModelError: a tensor is missing, unexpected or of the wrong shape.
    """
    weights_path, config_path = folder / WEIGHTS_FILE, folder / "config.json"
    tensors = MappedTensors.read(weights_path)
    with wrap_as_model_error(config_path), META_DEVICE:
        unet = UNet2DConditionModel.from_config(read_module_config(config_path, UNet2DConditionModel))
    layouts = read_layouts(read_json_object(config_path), tensors, weights_path)
    check_packed_layer_names(unet, layouts, config_path)
    with wrap_as_model_error(config_path):
        swap_packed_layers(unet, layouts)
    check_tensor_names(unet, tensors, weights_path)
    return unet.eval(), tensors


def check_tensor_names(module: nn.Module, tensors: Collection[str], path: Path) -> None:
    """Raise ModelError unless these are exactly the names of the module's tensors."""
    expected = set(module.state_dict())
    if missing := sorted(expected - set(tensors)):
        raise ModelError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unexpected := sorted(set(tensors) - expected):
        raise ModelError(f"{path}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]}")


def write_packed_unet(
    folder: Path,
    config: Mapping[str, Any],
    packed: Mapping[str, tuple[PackedWeight, tuple[int, ...]]],
    others: Mapping[str, Tensor],
    notes: Mapping[str, Any],
) -> None:
    """Write `config.json` and weights of a packed UNet.

    Args:
        folder: the UNet's folder.
        config: entries of `config.json` besides `quantization_config`.
        packed: weight and original shape of each packed layer.
        others: all other tensors.
        notes: further entries of `quantization_config`.
    """
    layers = {name: weight.layout.to_config_entry(shape) for name, (weight, shape) in sorted(packed.items())}
    quantization = {
        "quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "min_reader": FORMAT_VERSION,
        "layout": "tap-major", **notes, "layers": layers,
    }  # fmt: skip
    tensors = dict(others)
    for name, (weight, _) in packed.items():
        tensors |= {f"{name}.{leaf}": value for leaf, value in weight.tensors().items()}
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_safetensors(folder / WEIGHTS_FILE, tensors, dtypes, tensors.__getitem__)
    content = json.dumps({**config, "quantization_config": quantization}, indent=2)
    write_atomically((content + "\n").encode(), folder / "config.json")


def write_pipeline_index(folder: Path, **components: list[str]) -> None:
    """Write `model_index.json`, with which diffusers loads the folder as a pipeline.

    `components` replace SD v1's usual entries: component name -> [library, class].
    """
    scheduler = read_json_object(folder / "scheduler" / "scheduler_config.json").get("_class_name", "PNDMScheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers_version,
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], **components,
    }  # fmt: skip
    write_atomically((json.dumps(index, indent=2) + "\n").encode(), folder / PIPELINE_INDEX)


# The text encoder, the VAE and the noise schedule


def read_text_encoder(folder: Path) -> tuple[CLIPTextModel, MappedTensors]:
    """Return the text encoder on the meta device and the mapped tensors of its file."""
    weights_path, config_path = folder / TEXT_ENCODER_WEIGHTS_FILE, folder / "config.json"
    config = read_json_object(config_path)
    check_text_encoder_config(config, config_path)
    with wrap_as_model_error(config_path), META_DEVICE:
        entries = {name: config[name] for name in TEXT_ENCODER_CONFIG_KEYS if name in config}
        encoder = CLIPTextModel(CLIPTextConfig(**entries))
    tensors = MappedTensors.read(weights_path)
    tensors.rename(lambda name: name.removeprefix("text_model."))  # a prefix of transformers before 5
    tensors.pop("embeddings.position_ids", None)
    check_tensor_names(encoder, tensors, weights_path)
    tensors.update(
        {name: make_position_ids(value) for name, value in encoder.named_buffers() if name.endswith("position_ids")}
    )
    return encoder.eval(), tensors


def make_position_ids(like: Tensor) -> Tensor:
    """Return 0, 1, 2, ... in the shape of CLIP's position_ids, which are not stored in files."""
    return torch.arange(like.shape[-1]).expand(like.shape).clone()


def read_vae_decoder(folder: Path) -> tuple[AutoencoderKL, MappedTensors]:
    """Return the VAE without its encoder, on the meta device, and the mapped tensors of its file."""
    weights_path, config_path = folder / WEIGHTS_FILE, folder / "config.json"
    with wrap_as_model_error(config_path), META_DEVICE:
        vae = AutoencoderKL.from_config(read_module_config(config_path, AutoencoderKL))
    tensors = MappedTensors.read(weights_path)
    if any(name.startswith("encoder.") for name in tensors):
        check_tensor_names(vae, tensors, weights_path)
    vae.encoder = vae.quant_conv = None
    use_strip_layers(vae)
    tensors.rename(lambda name: None if name.startswith(("encoder.", "quant_conv.")) else name)
    check_tensor_names(vae, tensors, weights_path)
    return vae.eval(), tensors


def read_noise_schedule(path: Path) -> dict[str, Any]:
    """Read the noise schedule of a `scheduler_config.json`: beta_start, beta_end and beta_schedule."""
    config = read_json_object(path)
    check_scheduler_config(config, path)
    return {name: config[name] for name in BETA_KEYS}
