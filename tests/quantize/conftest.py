"""A small SD v1 checkpoint in the formats that other programs write."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.models import ldm_checkpoint
from tests.support.session import made_once
from tinysd_batch.quantize.convert import convert_model
from tinysd_batch.quantize.data_free import quantize_model
from tinysd_batch.quantize.sources.checkpoint_source import SourceOptions

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def models() -> ldm_checkpoint.Models:
    return ldm_checkpoint.random_models()


@pytest.fixture(scope="session")
def tensors(models: ldm_checkpoint.Models) -> dict[str, Tensor]:
    """The tensors of all components under LDM's names."""
    return {name: value.contiguous() for name, value in models.ldm_tensors().items()}


@pytest.fixture(scope="session")
def checkpoint(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "checkpoint/mine.safetensors", lambda out: save_file(tensors, out))


@pytest.fixture(scope="session")
def floats(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a float folder."""

    def convert(out: Path) -> None:
        convert_model(checkpoint, out, SourceOptions(), None, lambda _: None)

    return made_once(tmp_path_factory, "checkpoint/floats", convert)


@pytest.fixture(scope="session")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint at 2 bits."""

    def quantize(out: Path) -> None:
        quantize_model(checkpoint, out, SourceOptions(), lambda _: None)

    return made_once(tmp_path_factory, "checkpoint/packed", quantize)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write tensors as safetensors or pickle, by the suffix; entries of `beside` are stored next to a `state_dict`."""

    def write(tensors: dict[str, Any], name: str = "changed.safetensors", beside: dict[str, Any] | None = None) -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors if beside is None else {"state_dict": tensors, **beside}, path)
        return path

    return write


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
