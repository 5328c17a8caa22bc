"""Inspect a model: components, weights, bits and bytes, from file headers without reading the weights."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import list_sampler_differences
from tinysd_batch.model.checkpoint.folder import wrap_as_model_error
from tinysd_batch.model.checkpoint.info import compute_model_digest, read_model_defaults, read_model_info
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.offload.stage_estimate import MicroBatchShape
from tinysd_batch.model.packed.format import AffineRowWeight, GroupWeight, ZeroPointRowWeight
from tinysd_batch.model.sampling.noise_correction import NoiseCorrection, read_correction
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.quantize.convert import check_components_fit
from tinysd_batch.quantize.presets import get_layer_type
from tinysd_batch.quantize.sources.checkpoint_source import CheckpointSource, SourceOptions
from tinysd_batch.quantize.sources.component_files import WEIGHTS_FILE_STEMS, find_weights_file
from tinysd_batch.quantize.sources.detect import SD_V1, TINY_STABLE_DIFFUSION, detect_model_type
from tinysd_batch.quantize.sources.diffusers_folder import DiffusersFolderSource
from tinysd_batch.quantize.sources.ldm_names import EMA_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX, VAE_PREFIX
from tinysd_batch.quantize.sources.single_file import SingleFileSource
from tinysd_batch.quantize.sources.tensor_files import CheckpointContents, open_tensors

COMPONENT_PREFIXES = {
    UNET_PREFIX: "unet",
    VAE_PREFIX: "vae",
    TEXT_ENCODER_PREFIX: "text_encoder",
    EMA_PREFIX: "EMA copies",
}
OTHERS = "others"
LAYER_TYPE_BY_DIMENSIONS = {1: "norms and biases", 2: "linear", 3: "convolution", 4: "convolution"}
POSITION_IDS = "position_ids"
WEIGHT_FORMATS = (GroupWeight, AffineRowWeight, ZeroPointRowWeight)
PACKED_TENSOR_NAMES = {
    tensor.name for weight_format in WEIGHT_FORMATS for tensor in fields(weight_format) if tensor.name != "bits"
}
CODES_TENSOR = "qweight"
DEFAULT_LATENT_CHANNELS = 4  # if a configuration has no entry
USABLE_TYPES = (SD_V1, TINY_STABLE_DIFFUSION)
PACKED_MODEL, PACKED_REASON = "a packed model", "it is quantized already; a float model is needed"
CPU = torch.device("cpu")
EMBEDDED_NAME = "embedded"


@dataclass(slots=True)
class LayerGroup:
    """Layers of one type in a component."""

    name: str  # linear, convolution, embedding, norms and biases; for packed layers their type and bits
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Bits per weight, including scales and offsets."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(slots=True)
class ComponentContents:
    """What a component of a model holds."""

    name: str
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # number of tensors by dtype
    layer_groups: dict[str, LayerGroup] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(group.weights for group in self.layer_groups.values())

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.layer_groups.values())


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` reports about a model."""

    path: str
    name: str
    model_type: str
    refusal_reason: str | None  # why convert and quantize refuse it
    digest: str  # of a folder the one that jobs record, of a file its SHA-256
    components: list[ComponentContents]
    noise_correction: NoiseCorrection | None = None
    notes: list[str] = field(default_factory=list)
    unusable_reason: str | None = None  # of a file: why every command refuses it


def inspect_model(path: Path, *, allow_pickle: bool = False) -> Inspection:
    """Inspect a model folder or a checkpoint file.

    A folder must pass the checks of the commands that take it: `submit` and `txt2img` for a packed model, `convert`
    and `quantize` for a float model. What is wrong with a file is returned in `unusable_reason`.

    Raises:
        ModelError: the file cannot be read, or a check of the folder failed.
    """
    options = SourceOptions(allow_pickle=allow_pickle)
    if path.is_dir():
        return inspect_folder(path, options)
    contents = open_tensors(path, allow_pickle=allow_pickle)
    model_type = detect_model_type(contents)
    unusable_reason = None
    if model_type.name not in USABLE_TYPES:
        unusable_reason = f"{path}: this is {model_type.name}: {model_type.reason}"
    elif model_type.name == SD_V1:
        unusable_reason = find_unusable_reason(path, options)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inspection(
        str(path),
        path.stem,
        model_type.name,
        model_type.reason,
        digest,
        count_file_components(contents),
        unusable_reason=unusable_reason,
    )


def find_unusable_reason(path: Path, options: SourceOptions) -> str | None:
    """Return why `convert` and `quantize` refuse a file; None if they accept it."""
    try:
        check_source(SingleFileSource(path, options))
    except ModelError as error:
        return str(error)
    return None


def check_source(source: CheckpointSource) -> None:
    """Raise ModelError if a component of a float model is missing or wrong."""
    unet, vae, text_encoder = source.unet(), source.vae(), source.text_encoder()
    check_components_fit(unet.config, vae, text_encoder)


def check_loadable(path: Path) -> None:
    """Raise ModelError if the engine cannot generate with a model folder: load it, and plan an image from shapes."""
    name = str(path if str(path) != EMBEDDED_NAME else path.absolute())  # a folder of that name is not the model
    model = TinySD(read_model_info(name), CPU, torch.float32)
    info = model.info
    with wrap_as_model_error(path):
        model.planner.plan_stages(MicroBatchShape(1, info.native_px, info.native_px, info.max_tokens, prompts=1))


def count_file_components(contents: CheckpointContents) -> list[ComponentContents]:
    """Count the contents of a single file by component."""
    components: dict[str, dict[str, Tensor]] = {}
    for name, tensor in contents.tensors.items():
        component = next(
            (component for prefix, component in COMPONENT_PREFIXES.items() if name.startswith(prefix)), OTHERS
        )
        components.setdefault(component, {})[name] = tensor
    order = [*COMPONENT_PREFIXES.values(), OTHERS]
    return [count_component(name, components[name], {}) for name in order if name in components]


def inspect_folder(path: Path, options: SourceOptions) -> Inspection:
    """Inspect a model folder, packed or float. Raises ModelError as `inspect_model` does."""
    if not (path / "unet" / "config.json").exists():
        raise ModelError(f"{path}: not a model folder, it has no unet/config.json")
    unet_config = read_json_object(path / "unet" / "config.json")
    name = read_model_defaults(path).name
    if is_packed := "quantization_config" in unet_config:
        check_loadable(path)
        notes = list_sampler_differences(read_json_object(path / "scheduler" / "scheduler_config.json"))
    else:
        source = DiffusersFolderSource(path, options)
        check_source(source)
        notes = source.report.notes
    packed_layers = get_packed_layers(unet_config)
    components = []
    for component in WEIGHTS_FILE_STEMS:
        if (path / component).is_dir():
            weights_path = find_weights_file(path / component, component)
            tensors = open_tensors(weights_path, allow_pickle=options.allow_pickle).tensors
            components.append(count_component(component, tensors, packed_layers if component == "unet" else {}))
    correction = read_correction(path / "unet", unet_config.get("out_channels", DEFAULT_LATENT_CHANNELS))
    model_type, reason = (PACKED_MODEL, PACKED_REASON) if is_packed else (f"{SD_V1}'s architecture, float folder", None)
    return Inspection(str(path), name, model_type, reason, read_model_digest(path), components, correction, notes)


def get_packed_layers(unet_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the packed layers that a UNet's configuration lists."""
    layers: Mapping[str, Any] = (unet_config.get("quantization_config") or {}).get("layers", {})
    return layers


def read_model_digest(path: Path) -> str:
    """Return the digest that jobs record; empty if the folder is incomplete."""
    try:
        return compute_model_digest(path)
    except FileNotFoundError:
        return ""


def count_component(name: str, tensors: Mapping[str, Tensor], packed_layers: Mapping[str, Any]) -> ComponentContents:
    """Count a component's weights and bytes by layer group; `packed_layers` has an entry for each packed layer."""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    contents = ComponentContents(name, len(tensors), dict(dtypes))
    for tensor_name, tensor in tensors.items():
        layer, _, leaf = tensor_name.rpartition(".")
        is_packed = leaf in PACKED_TENSOR_NAMES and layer in packed_layers
        if is_packed:
            shape = packed_layers[layer]["shape"]
            group_name = f"{get_layer_type(layer)}, {packed_layers[layer]['bits']} bits"
        else:
            shape = list(tensor.shape)
            group_name = classify_float_tensor(tensor_name, len(shape))
        group = contents.layer_groups.setdefault(group_name, LayerGroup(group_name))
        group.bytes += tensor.numel() * tensor.element_size()
        # Scales and offsets of packed layers take bytes but are not weights.
        if leaf != POSITION_IDS and (leaf == CODES_TENSOR or not is_packed):
            group.weights += math.prod(shape)
    return contents


def classify_float_tensor(name: str, dimensions: int) -> str:
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return "embedding"
    return LAYER_TYPE_BY_DIMENSIONS.get(dimensions, OTHERS)
