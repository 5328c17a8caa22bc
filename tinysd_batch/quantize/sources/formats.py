"""Open a checkpoint of any supported format."""

from pathlib import Path

from tinysd_batch.errors import ModelError
from tinysd_batch.quantize.sources.checkpoint_source import CheckpointSource, SourceOptions
from tinysd_batch.quantize.sources.diffusers_folder import DiffusersFolderSource
from tinysd_batch.quantize.sources.single_file import SingleFileSource
from tinysd_batch.quantize.sources.tensor_files import open_tensors
from tinysd_batch.quantize.sources.tiny_stable_diffusion import TinyStableDiffusionSource, is_tiny_stable_diffusion


def open_source(path: Path, options: SourceOptions) -> CheckpointSource:
    """Open a single file or a model folder. Raises ModelError if it is neither, or of an unsupported type."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.is_file():
        names = open_tensors(path, allow_pickle=options.allow_pickle).tensors
        source_class = TinyStableDiffusionSource if is_tiny_stable_diffusion(names) else SingleFileSource
        return source_class(path, options)
    if not (path / "unet").is_dir():
        raise ModelError(f"{path}: not a model folder, it has no unet; name one in diffusers' layout, or a single file")
    return DiffusersFolderSource(path, options)
