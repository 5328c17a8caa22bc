"""Read SD v1 from a single file, whose tensors have LDM's names. diffusers' own functions rename them."""

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.info import MODEL_DEFAULTS_FILE
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
    SourceOptions,
    SourceReport,
    check_text_encoder_tensors,
    check_unet_tensors,
    write_json,
)
from tinysd_batch.quantize.sources.clip_tokenizer import write_clip_tokenizer
from tinysd_batch.quantize.sources.detect import SD_V1, detect_model_type
from tinysd_batch.quantize.sources.ldm_config import (
    SCHEDULER_CONFIG,
    UNET_CONVERTER_CONFIG,
    check_noise_schedule,
    infer_text_encoder_config,
    infer_unet_config,
)
from tinysd_batch.quantize.sources.ldm_names import (
    CLIP_PREFIX,
    EMA_COPIES,
    EMA_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    convert_to_diffusers_names,
    find_ignored_category,
)
from tinysd_batch.quantize.sources.tensor_files import CheckpointContents, open_tensors
from tinysd_batch.quantize.sources.vae import convert_ldm_vae, read_vae


class SingleFileSource:
    """An SD v1 checkpoint file. Raises ModelError if the file holds another model, or not all of its components."""

    expected_type = SD_V1

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.options = options
        self.name = path.stem
        self.report = SourceReport()
        contents = self.open_file()
        if (model_type := detect_model_type(contents)).name != self.expected_type:
            raise ModelError(f"{path}: this is {model_type.name}: {model_type.reason}")
        check_noise_schedule(contents.tensors, path)
        self.classify_names(contents)

    def open_file(self) -> CheckpointContents:
        return open_tensors(self.path, allow_pickle=self.options.allow_pickle)

    def classify_names(self, contents: CheckpointContents) -> None:
        """Count ignored names in `report`; raise ModelError for unknown names and missing components."""
        unexpected = []
        for name in [*contents.tensors, *contents.other_names]:
            if category := find_ignored_category(name):
                if category == EMA_COPIES and self.options.ema:
                    continue
                self.report.ignored[category] = self.report.ignored.get(category, 0) + 1
            elif name not in contents.tensors or not name.startswith((UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX)):
                unexpected.append(name)
        if unexpected:
            raise ModelError(f"{self.path}: {len(unexpected)} unexpected names, the first is {unexpected[0]!r}")
        if not any(name.startswith(CLIP_PREFIX) for name in contents.tensors):
            raise ModelError(f"{self.path}: it contains no text encoder; use a checkpoint that has one")
        if self.options.vae is None and not any(name.startswith(VAE_PREFIX) for name in contents.tensors):
            raise ModelError(f"{self.path}: it contains no VAE; name one with --vae FILE_OR_FOLDER")

    def unet(self) -> SourceComponent:
        tensors = self.open_file().tensors
        selected = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)}
        if self.options.ema:
            selected = {name: find_ema_copy(name, tensors, self.path) for name in selected}
        converted = convert_to_diffusers_names(
            selected, lambda ldm_tensors: convert_ldm_unet_checkpoint(ldm_tensors, UNET_CONVERTER_CONFIG), self.path
        )
        component = SourceComponent(infer_unet_config(converted, self.path), converted, self.path, tensors)
        check_unet_tensors(component)
        return component

    def vae(self) -> SourceComponent:
        if self.options.vae is not None:
            return read_vae(self.options.vae, self.options)
        return convert_ldm_vae(self.open_file().tensors, self.path)

    def text_encoder(self) -> SourceComponent:
        selected = {
            name: tensor
            for name, tensor in self.open_file().tensors.items()
            if name.startswith(CLIP_PREFIX) and find_ignored_category(name) is None
        }
        converted = convert_to_diffusers_names(selected, convert_ldm_clip_checkpoint, self.path)
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
        component = SourceComponent(infer_text_encoder_config(tensors, self.path), tensors, self.path)
        check_text_encoder_tensors(component)
        return component

    def write_scheduler_and_tokenizer(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
        write_json(folder / MODEL_DEFAULTS_FILE, {"name": self.name})
        write_clip_tokenizer(folder / "tokenizer", max_tokens=self.position_embedding().shape[0])

    def position_embedding(self) -> Tensor:
        """Return the text encoder's position embedding [T, D], which some files name without `text_model.`."""
        tensors = self.open_file().tensors
        name = f"{CLIP_PREFIX}text_model.embeddings.position_embedding.weight"
        embedding = tensors.get(name, tensors.get(name.replace("text_model.", "")))
        assert embedding is not None, name
        return embedding


def find_ema_copy(name: str, tensors: Mapping[str, Tensor], path: Path) -> Tensor:
    """Return the EMA copy of a UNet tensor, whose name has no dots. Raises ModelError if there is none."""
    ema_name = EMA_PREFIX + name.removeprefix("model.").replace(".", "")
    if ema_name not in tensors:
        raise ModelError(f"{path}: --ema: the EMA copies are incomplete, {ema_name} is missing")
    return tensors[ema_name]
