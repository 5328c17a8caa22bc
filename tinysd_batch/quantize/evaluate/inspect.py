"""What is in a model: parts, weights, bits and bytes, told from headers without reading the weights."""

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
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.model.sampling.noise_correction import NoiseCorrection, read_correction
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
PACKED_TENSOR_NAMES = {each.name for kind in WEIGHT_FORMATS for each in fields(kind) if each.name != "bits"}
CODES_TENSOR = "qweight"
DEFAULT_LATENT_CHANNELS = 4  # where a configuration does not say
USABLE_TYPES = (SD_V1, TINY_STABLE_DIFFUSION)
PACKED_MODEL, PACKED_REASON = "a packed model", "it is quantized already; a float model is needed"
CPU = torch.device("cpu")
EMBEDDED_NAME = "embedded"


@dataclass(slots=True)
class LayerGroup:
    """Layers of one sort in a part."""

    name: str  # linear, convolution, embedding, norms and biases; of packed layers their sort and bits
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Per weight, with what quantization stores beside it."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(slots=True)
class ComponentContents:
    """A part of a model."""

    name: str
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # tensors of each
    layer_groups: dict[str, LayerGroup] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(each.weights for each in self.layer_groups.values())

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.layer_groups.values())


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` says of a model."""

    path: str
    name: str
    model_type: str
    refusal_reason: str | None  # why neither convert nor quantize takes it
    digest: str  # of a folder as jobs record it; of a file its SHA-256
    components: list[ComponentContents]
    noise_correction: NoiseCorrection | None = None
    notes: list[str] = field(default_factory=list)
    unusable_reason: str | None = None  # of a file: why no command takes it


def inspect_model(path: Path, *, allow_pickle: bool = False) -> Inspection:
    """Look into a model folder or a checkpoint file. Raises ModelError where that cannot be read.

    A folder must pass the checks of the command that takes it: `submit` and `txt2img` of a packed one, `convert` and
    `quantize` of one with floats. What is wrong with a file stands in `fault`.
    """
    options = SourceOptions(allow_pickle=allow_pickle)
    if path.is_dir():
        return inspect_folder(path, options)
    contents = open_tensors(path, allow_pickle=allow_pickle)
    kind = detect_model_type(contents)
    fault = None if kind.name in USABLE_TYPES else f"{path}: this is {kind.name}: {kind.reason}"
    if kind.name == SD_V1:
        fault = find_unusable_reason(path, options)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inspection(
        str(path), path.stem, kind.name, kind.reason, digest, count_file_components(contents), unusable_reason=fault
    )


def find_unusable_reason(path: Path, options: SourceOptions) -> str | None:
    """Why `convert` and `quantize` refuse a file."""
    try:
        check_source(SingleFileSource(path, options))
    except ModelError as error:
        return str(error)
    return None


def check_source(source: CheckpointSource) -> None:
    """Raise ModelError where a part of a float model is missing or wrong."""
    unet, vae, text = source.unet(), source.vae(), source.text_encoder()
    check_components_fit(unet.config, vae, text)


def check_loadable(path: Path) -> None:
    """Raise ModelError where a model folder cannot be generated with: it is loaded, and walked through by shapes."""
    name = str(path if str(path) != EMBEDDED_NAME else path.absolute())  # a folder of that name is not the model
    model = TinySD(read_model_info(name), CPU, torch.float32)
    info = model.info
    with wrap_as_model_error(path):
        model.planner.plan_stages(MicroBatchShape(1, info.native_px, info.native_px, info.max_tokens, prompts=1))


def count_file_components(contents: CheckpointContents) -> list[ComponentContents]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in contents.tensors.items():
        part = next((part for prefix, part in COMPONENT_PREFIXES.items() if name.startswith(prefix)), OTHERS)
        parts.setdefault(part, {})[name] = value
    order = [*COMPONENT_PREFIXES.values(), OTHERS]
    return [count_component(name, parts[name], {}) for name in order if name in parts]


def inspect_folder(path: Path, options: SourceOptions) -> Inspection:
    if not (path / "unet" / "config.json").exists():
        raise ModelError(f"{path}: not a model folder, it has no unet/config.json")
    unet = read_json_object(path / "unet" / "config.json")
    notes, name = [], read_model_defaults(path).name
    if is_packed := "quantization_config" in unet:
        check_loadable(path)
        notes = list_sampler_differences(read_json_object(path / "scheduler" / "scheduler_config.json"))
    else:
        source = DiffusersFolderSource(path, options)
        check_source(source)
        notes = source.report.notes
    packed = get_packed_layers(unet)
    parts = []
    for part in WEIGHTS_FILE_STEMS:
        if (path / part).is_dir():
            tensors = open_tensors(find_weights_file(path / part, part), allow_pickle=options.allow_pickle).tensors
            parts.append(count_component(part, tensors, packed if part == "unet" else {}))
    correction = read_correction(path / "unet", unet.get("out_channels", DEFAULT_LATENT_CHANNELS))
    kind, reason = (PACKED_MODEL, PACKED_REASON) if is_packed else (f"{SD_V1}'s architecture, float folder", None)
    return Inspection(str(path), name, kind, reason, read_model_digest(path), parts, correction, notes)


def get_packed_layers(unet: Mapping[str, Any]) -> Mapping[str, Any]:
    """The packed layers that a UNet's configuration lists."""
    layers: Mapping[str, Any] = (unet.get("quantization_config") or {}).get("layers", {})
    return layers


def read_model_digest(path: Path) -> str:
    """As jobs record it; empty where the folder is not complete."""
    try:
        return compute_model_digest(path)
    except FileNotFoundError:
        return ""


def count_component(name: str, tensors: Mapping[str, Tensor], packed: Mapping[str, Any]) -> ComponentContents:
    """Count a part's tensors. `packed` lists the packed layers with their shapes."""
    found = ComponentContents(
        name, len(tensors), dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values()))
    )
    for tensor_name, value in tensors.items():
        layer, _, leaf = tensor_name.rpartition(".")
        shape = list(value.shape)
        is_packed = leaf in PACKED_TENSOR_NAMES and layer in packed
        if is_packed:
            shape = packed[layer]["shape"]
        title = (
            f"{get_layer_type(layer)}, {packed[layer]['bits']} bits"
            if is_packed
            else classify_float_tensor(tensor_name, len(shape))
        )
        each = found.layer_groups.setdefault(title, LayerGroup(title))
        each.bytes += value.numel() * value.element_size()
        # Scales and offsets cost bytes, but are no weights.
        if leaf != POSITION_IDS and (leaf == CODES_TENSOR or not is_packed):
            each.weights += math.prod(shape)
    return found


def classify_float_tensor(name: str, dimensions: int) -> str:
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return "embedding"
    return LAYER_TYPE_BY_DIMENSIONS.get(dimensions, OTHERS)
