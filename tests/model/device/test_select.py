"""Select a device, and explain why a GPU cannot be used."""

from pathlib import Path

import pytest
import torch

from tinysd_batch.errors import UsageError
from tinysd_batch.model.device import select
from tinysd_batch.model.device.select import choose_device, is_capability_supported, list_nvidia_gpus

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((6, 1), CU126, True),  # GTX 1060: code for 6.0 runs on 6.1
        ((6, 1), CU130, False),
        ((7, 0), CU130, False),
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # PTX, compiled at load time
        ((13, 0), CU126, False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((7, 5), [], False),
    ],
)
def test_architectures_that_run_on_a_gpu(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    assert is_capability_supported(capability, architectures) is runs


def add_gpu(folder: Path, number: int, model: str) -> None:
    (folder / f"0000:0{number}:00.0").mkdir(parents=True)
    (folder / f"0000:0{number}:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 16\n")


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models = ["NVIDIA GeForce GTX 1060 6GB", "NVIDIA GeForce GTX 1050 Ti"]
    nodes = tmp_path / "dev"
    nodes.mkdir()
    for number, model in enumerate(models):
        add_gpu(tmp_path / "gpus", number, model)
    assert list_nvidia_gpus(tmp_path / "gpus", nodes) == []  # a container without a GPU
    (nodes / "nvidia0").touch()
    assert list_nvidia_gpus(tmp_path / "gpus", nodes) == models
    assert list_nvidia_gpus(tmp_path / "none", nodes) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden by the user
    assert list_nvidia_gpus(tmp_path / "gpus", nodes) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_gpus_that_torch_cannot_use_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device(None) == torch.device("cpu")
    add_gpu(tmp_path, 1, "NVIDIA GeForce GTX 1060 6GB")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(select, "list_nvidia_gpus", lambda: list_nvidia_gpus(tmp_path, tmp_path))
    with pytest.raises(UsageError, match=r"GTX 1060 6GB, which torch .* cannot use; install a CUDA build .*cu126"):
        choose_device(None)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device cuda: torch sees no GPU here"):
        choose_device("cuda")
