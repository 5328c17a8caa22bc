"""SD v1 in a single file, in the names of its first authors (LDM). diffusers' own functions rename the tensors."""

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
)
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
    """An SD v1 checkpoint file. Raises ModelError where it is something else, or incomplete."""

    expected_type = SD_V1

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.path = path
        self.options = options
        self.name = path.stem
        self.report = SourceReport()
        contents = self.open_file()
        if (kind := detect_model_type(contents)).name != self.expected_type:
            raise ModelError(f"{path}: this is {kind.name}: {kind.reason}")
        check_noise_schedule(contents.tensors, path)
        self.classify_names(contents)

    def open_file(self) -> CheckpointContents:
        return open_tensors(self.path, allow_pickle=self.options.allow_pickle)

    def classify_names(self, contents: CheckpointContents) -> None:
        """Count what is left out; raise ModelError for names that nobody knows, and for parts that are not there."""
        strange = []
        for name in [*contents.tensors, *contents.other_names]:
            if kind := find_ignored_category(name):
                if kind == EMA_COPIES and self.options.ema:
                    continue
                self.report.ignored[kind] = self.report.ignored.get(kind, 0) + 1
            elif name not in contents.tensors or not name.startswith((UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX)):
                strange.append(name)
        if strange:
            raise ModelError(f"{self.path}: {len(strange)} unexpected names, the first is {strange[0]!r}")
        if not any(name.startswith(CLIP_PREFIX) for name in contents.tensors):
            raise ModelError(f"{self.path}: no text encoder is in it; a checkpoint that has one is needed")
        if self.options.vae is None and not any(name.startswith(VAE_PREFIX) for name in contents.tensors):
            raise ModelError(f"{self.path}: no autoencoder is in it; name one with --vae FILE_OR_FOLDER")

    def unet(self) -> SourceComponent:
        tensors = self.open_file().tensors
        mine = {name: value for name, value in tensors.items() if name.startswith(UNET_PREFIX)}
        if self.options.ema:
            mine = {name: find_ema_copy(name, tensors, self.path) for name in mine}
        converted = convert_to_diffusers_names(
            mine, lambda named: convert_ldm_unet_checkpoint(named, UNET_CONVERTER_CONFIG), self.path
        )
        part = SourceComponent(infer_unet_config(converted, self.path), converted, self.path, tensors)
        check_unet_tensors(part)
        return part

    def vae(self) -> SourceComponent:
        if self.options.vae is not None:
            return read_vae(self.options.vae, self.options)
        return convert_ldm_vae(self.open_file().tensors, self.path)

    def text_encoder(self) -> SourceComponent:
        tensors = self.open_file().tensors
        mine = {
            name: value
            for name, value in tensors.items()
            if name.startswith(CLIP_PREFIX) and find_ignored_category(name) is None
        }
        renamed = convert_to_diffusers_names(mine, convert_ldm_clip_checkpoint, self.path)
        bare = {name.removeprefix("text_model."): value for name, value in renamed.items()}
        part = SourceComponent(infer_text_encoder_config(bare, self.path), bare, self.path)
        check_text_encoder_tensors(part)
        return part

    def write_scheduler_and_tokenizer(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
        write_json(folder / MODEL_DEFAULTS_FILE, {"name": self.name})
        positions = f"{CLIP_PREFIX}text_model.embeddings.position_embedding.weight"
        tensors = self.open_file().tensors
        known = tensors.get(positions, tensors.get(positions.replace("text_model.", "")))
        assert known is not None, positions
        write_clip_tokenizer(folder / "tokenizer", known.shape[0])


def find_ema_copy(name: str, tensors: Mapping[str, Tensor], where: Path) -> Tensor:
    """The averaged copy of a UNet tensor, whose name is written without dots; raise ModelError without one."""
    flat = EMA_PREFIX + name.removeprefix("model.").replace(".", "")
    if flat not in tensors:
        raise ModelError(f"{where}: --ema: the copies are not complete, {flat} is missing")
    return tensors[flat]
