"""Open a checkpoint of any supported format."""

from pathlib import Path

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.sources.checkpoint_source import (
    Options,
    Source,
)
from tinysd_batch.quantize.sources.diffusers_folder import ModelFolder
from tinysd_batch.quantize.sources.single_file import SingleFile
from tinysd_batch.quantize.sources.tensor_files import open_tensors
from tinysd_batch.quantize.sources.tiny_stable_diffusion import OriginFile, is_origin


def open_source(path: Path, options: Options) -> Source:
    """A single file or a model folder. Raises ModelError where it is neither, or of a kind that is not read."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_file():
        names = open_tensors(path, allow_pickle=options.allow_pickle).tensors
        return OriginFile(path, options) if is_origin(names) else SingleFile(path, options)
    if not (path / "unet").is_dir():
        raise ModelError(f"{path}: not a model folder, it has no unet; name one in diffusers' layout, or a single file")
    return ModelFolder(path, options)
