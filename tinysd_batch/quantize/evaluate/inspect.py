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
from tinysd_batch.model.checkpoint.config_checks import sampler_notes
from tinysd_batch.model.checkpoint.folder import building_from
from tinysd_batch.model.checkpoint.info import model_digest, read_defaults, read_model_info
from tinysd_batch.model.checkpoint.json_file import read_json
from tinysd_batch.model.offload.stage_estimate import Shape
from tinysd_batch.model.packed.format import PackedWeight, RowWeight, WholeRowWeight
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.model.sampling.noise_correction import NoiseCorrection, read_correction
from tinysd_batch.quantize.convert import check_parts
from tinysd_batch.quantize.presets import sort_of
from tinysd_batch.quantize.sources.checkpoint_source import Options, Source
from tinysd_batch.quantize.sources.component_files import STEMS, weights_file
from tinysd_batch.quantize.sources.detect import ORIGIN, SD_V1, kind_of
from tinysd_batch.quantize.sources.diffusers_folder import ModelFolder
from tinysd_batch.quantize.sources.ldm_names import EMA, TEXT, UNET, VAE
from tinysd_batch.quantize.sources.single_file import SingleFile
from tinysd_batch.quantize.sources.tensor_files import Contents, open_tensors

PREFIXES = {UNET: "unet", VAE: "vae", TEXT: "text_encoder", EMA: "EMA copies"}
OTHERS = "others"
BY_DIMENSIONS = {1: "norms and biases", 2: "linear", 3: "convolution", 4: "convolution"}
NO_WEIGHTS = "position_ids"
KINDS = (PackedWeight, WholeRowWeight, RowWeight)
PACKED_NAMES = {each.name for kind in KINDS for each in fields(kind) if each.name != "bits"}
CODES = "qweight"
LATENT_CHANNELS = 4  # where a configuration does not say
USABLE = (SD_V1, ORIGIN)
PACKED, PACKED_REASON = "a packed model", "it is quantized already; a float model is needed"
CPU = torch.device("cpu")
EMBEDDED = "embedded"


@dataclass(slots=True)
class Class:
    """Layers of one sort in a part."""

    name: str  # linear, convolution, embedding, norms and biases; of packed layers their sort and bits
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Per weight, with what quantization stores beside it."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(slots=True)
class PartFound:
    """A part of a model."""

    name: str
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # tensors of each
    classes: dict[str, Class] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(each.weights for each in self.classes.values())

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.classes.values())


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` says of a model."""

    path: str
    name: str
    kind: str
    refused: str | None  # why neither convert nor quantize takes it
    digest: str  # of a folder as jobs record it; of a file its SHA-256
    parts: list[PartFound]
    correction: NoiseCorrection | None = None
    notes: list[str] = field(default_factory=list)
    fault: str | None = None  # of a file: why no command takes it


def inspect_model(path: Path, *, allow_pickle: bool = False) -> Inspection:
    """Look into a model folder or a checkpoint file. Raises ModelError where that cannot be read.

    A folder must pass the checks of the command that takes it: `submit` and `txt2img` of a packed one, `convert` and
    `quantize` of one with floats. What is wrong with a file stands in `fault`.
    """
    options = Options(allow_pickle=allow_pickle)
    if path.is_dir():
        return inspect_folder(path, options)
    contents = open_tensors(path, allow_pickle=allow_pickle)
    kind = kind_of(contents)
    fault = None if kind.name in USABLE else f"{path}: this is {kind.name}: {kind.reason}"
    if kind.name == SD_V1:
        fault = fault_of(path, options)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inspection(str(path), path.stem, kind.name, kind.reason, digest, parts_of_file(contents), fault=fault)


def fault_of(path: Path, options: Options) -> str | None:
    """Why `convert` and `quantize` refuse a file."""
    try:
        check_source(SingleFile(path, options))
    except ModelError as error:
        return str(error)
    return None


def check_source(source: Source) -> None:
    """Raise ModelError where a part of a float model is missing or wrong."""
    unet, vae, text = source.unet(), source.vae(), source.text_encoder()
    check_parts(unet.config, vae, text)


def check_loads(path: Path) -> None:
    """Raise ModelError where a model folder cannot be generated with: it is loaded, and walked through by shapes."""
    name = str(path if str(path) != EMBEDDED else path.absolute())  # a folder of that name is not the model
    model = TinySD(read_model_info(name), CPU, torch.float32)
    info = model.info
    with building_from(path):
        model.memory.phases(Shape(1, info.native_px, info.native_px, info.max_tokens, prompts=1))


def parts_of_file(contents: Contents) -> list[PartFound]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in contents.tensors.items():
        part = next((part for prefix, part in PREFIXES.items() if name.startswith(prefix)), OTHERS)
        parts.setdefault(part, {})[name] = value
    order = [*PREFIXES.values(), OTHERS]
    return [count_part(name, parts[name], {}) for name in order if name in parts]


def inspect_folder(path: Path, options: Options) -> Inspection:
    if not (path / "unet" / "config.json").exists():
        raise ModelError(f"{path}: not a model folder, it has no unet/config.json")
    unet = read_json(path / "unet" / "config.json")
    notes, name = [], read_defaults(path).name
    if is_packed := "quantization_config" in unet:
        check_loads(path)
        notes = sampler_notes(read_json(path / "scheduler" / "scheduler_config.json"))
    else:
        source = ModelFolder(path, options)
        check_source(source)
        notes = source.found.notes
    packed = layers_of(unet)
    parts = []
    for part in STEMS:
        if (path / part).is_dir():
            tensors = open_tensors(weights_file(path / part, part), allow_pickle=options.allow_pickle).tensors
            parts.append(count_part(part, tensors, packed if part == "unet" else {}))
    correction = read_correction(path / "unet", unet.get("out_channels", LATENT_CHANNELS))
    kind, reason = (PACKED, PACKED_REASON) if is_packed else (f"{SD_V1}'s architecture, float folder", None)
    return Inspection(str(path), name, kind, reason, digest_of(path), parts, correction, notes)


def layers_of(unet: Mapping[str, Any]) -> Mapping[str, Any]:
    """The packed layers that a UNet's configuration lists."""
    layers: Mapping[str, Any] = (unet.get("quantization_config") or {}).get("layers", {})
    return layers


def digest_of(path: Path) -> str:
    """As jobs record it; empty where the folder is not complete."""
    try:
        return model_digest(path)
    except FileNotFoundError:
        return ""


def count_part(name: str, tensors: Mapping[str, Tensor], packed: Mapping[str, Any]) -> PartFound:
    """Count a part's tensors. `packed` lists the packed layers with their shapes."""
    found = PartFound(name, len(tensors), dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())))
    for tensor_name, value in tensors.items():
        layer, _, leaf = tensor_name.rpartition(".")
        shape = list(value.shape)
        is_packed = leaf in PACKED_NAMES and layer in packed
        if is_packed:
            shape = packed[layer]["shape"]
        title = f"{sort_of(layer)}, {packed[layer]['bits']} bits" if is_packed else class_of(tensor_name, len(shape))
        each = found.classes.setdefault(title, Class(title))
        each.bytes += value.numel() * value.element_size()
        # Scales and offsets cost bytes, but are no weights.
        if leaf != NO_WEIGHTS and (leaf == CODES or not is_packed):
            each.weights += math.prod(shape)
    return found


def class_of(name: str, dimensions: int) -> str:
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        return "embedding"
    return BY_DIMENSIONS.get(dimensions, OTHERS)
