"""SD v1 in a single file, in the names of its first authors (LDM). diffusers' own functions rename the tensors."""

from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
)
from torch import Tensor

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.info import OUR_FILE
from tinysd_batch.quantize.sources.checkpoint_source import (
    Found,
    Options,
    Part,
    check_text_encoder,
    check_unet,
    write_json,
)
from tinysd_batch.quantize.sources.clip_tokenizer import write_tokenizer
from tinysd_batch.quantize.sources.detect import SD_V1, kind_of
from tinysd_batch.quantize.sources.ldm_config import (
    SCHEDULER,
    UNET_LAYERS,
    check_schedule,
    text_config,
    unet_config,
)
from tinysd_batch.quantize.sources.ldm_names import CLIP, COPIES, EMA, UNET, VAE, convert, spare_kind
from tinysd_batch.quantize.sources.tensor_files import Contents, open_tensors
from tinysd_batch.quantize.sources.vae import read_vae, vae_part


class SingleFile:
    """An SD v1 checkpoint file. Raises ModelError where it is something else, or incomplete."""

    reads = SD_V1

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.options = options
        self.name = path.stem
        self.found = Found()
        contents = self.open()
        if (kind := kind_of(contents)).name != self.reads:
            raise ModelError(f"{path}: this is {kind.name}: {kind.reason}")
        check_schedule(contents.tensors, path)
        self.sort(contents)

    def open(self) -> Contents:
        return open_tensors(self.path, allow_pickle=self.options.allow_pickle)

    def sort(self, contents: Contents) -> None:
        """Count what is left out; raise ModelError for names that nobody knows, and for parts that are not there."""
        strange = []
        for name in [*contents.tensors, *contents.others]:
            if kind := spare_kind(name):
                if kind == COPIES and self.options.ema:
                    continue
                self.found.left_out[kind] = self.found.left_out.get(kind, 0) + 1
            elif name not in contents.tensors or not name.startswith((UNET, VAE, CLIP)):
                strange.append(name)
        if strange:
            raise ModelError(f"{self.path}: {len(strange)} unexpected names, the first is {strange[0]!r}")
        if not any(name.startswith(CLIP) for name in contents.tensors):
            raise ModelError(f"{self.path}: no text encoder is in it; a checkpoint that has one is needed")
        if self.options.vae is None and not any(name.startswith(VAE) for name in contents.tensors):
            raise ModelError(f"{self.path}: no autoencoder is in it; name one with --vae FILE_OR_FOLDER")

    def unet(self) -> Part:
        tensors = self.open().tensors
        mine = {name: value for name, value in tensors.items() if name.startswith(UNET)}
        if self.options.ema:
            mine = {name: ema_copy(name, tensors, self.path) for name in mine}
        converted = convert(mine, lambda named: convert_ldm_unet_checkpoint(named, UNET_LAYERS), self.path)
        part = Part(unet_config(converted, self.path), converted, self.path, tensors)
        check_unet(part)
        return part

    def vae(self) -> Part:
        if self.options.vae is not None:
            return read_vae(self.options.vae, self.options)
        return vae_part(self.open().tensors, self.path)

    def text_encoder(self) -> Part:
        tensors = self.open().tensors
        mine = {name: value for name, value in tensors.items() if name.startswith(CLIP) and spare_kind(name) is None}
        renamed = convert(mine, convert_ldm_clip_checkpoint, self.path)
        bare = {name.removeprefix("text_model."): value for name, value in renamed.items()}
        part = Part(text_config(bare, self.path), bare, self.path)
        check_text_encoder(part)
        return part

    def write_rest(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(folder / OUR_FILE, {"name": self.name})
        positions = f"{CLIP}text_model.embeddings.position_embedding.weight"
        tensors = self.open().tensors
        known = tensors.get(positions, tensors.get(positions.replace("text_model.", "")))
        assert known is not None, positions
        write_tokenizer(folder / "tokenizer", known.shape[0])


def ema_copy(name: str, tensors: Mapping[str, Tensor], where: Path) -> Tensor:
    """The averaged copy of a UNet tensor, whose name is written without dots; raise ModelError without one."""
    flat = EMA + name.removeprefix("model.").replace(".", "")
    if flat not in tensors:
        raise ModelError(f"{where}: --ema: the copies are not complete, {flat} is missing")
    return tensors[flat]
