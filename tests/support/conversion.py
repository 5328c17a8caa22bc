"""Convert checkpoints in tests, and compare the result with the models that they were made from."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import ldm_checkpoint
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.quantize.convert import convert_model
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions

Tensors = dict[str, Tensor]
WEIGHTS_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def convert(source: Path, out: Path, dtype: str | None = None, **options: Any) -> list[str]:
    """Convert and return the status lines."""
    lines: list[str] = []
    convert_model(source, out, SourceOptions(**options), dtype, lines.append)
    return lines


def read_text_tensors(out: Path) -> Tensors:
    loaded = load_file(out / "text_encoder" / "model.safetensors")
    return {name.removeprefix("text_model."): value for name, value in loaded.items()}


def check_same(out: Path, models: ldm_checkpoint.Models, dtype: torch.dtype = torch.float32) -> None:
    """Assert that a converted folder holds exactly the models' weights."""
    assert ldm_checkpoint.same_tensors(models.unet, load_file(out / "unet" / WEIGHTS_FILE), dtype)
    assert ldm_checkpoint.same_tensors(models.vae, load_file(out / "vae" / WEIGHTS_FILE), dtype)
    assert ldm_checkpoint.same_tensors(models.text_encoder, read_text_tensors(out), dtype)
