"""Damage files of a packed model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE

Tensors = dict[str, torch.Tensor]


LAYER = "mid_block.resnets.0.conv1"


def damage(model: Path, out: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(model, out)
    tensors = load_file(out / "unet" / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, out / "unet" / WEIGHTS_FILE)
    return out


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})
