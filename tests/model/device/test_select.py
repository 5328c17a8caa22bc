from pathlib import Path

import pytest
import torch

from tinysd_batch.errors import UsageError
from tinysd_batch.model.device import select
from tinysd_batch.model.device.select import choose_device, is_capability_supported, list_nvidia_gpus

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((6, 1), CU126, True),  # GTX 1060: code for 6.0 runs on 6.1
        ((6, 1), CU130, False),
        ((7, 0), CU130, False),
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # compiled when it is loaded
        ((13, 0), CU126, False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((7, 5), [], False),
    ],
)
def test_which_cards_a_build_has_code_for(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert is_capability_supported(capability, built_for) is runs


def card(folder: Path, number: int, model: str) -> None:
    (folder / f"0000:0{number}:00.0").mkdir(parents=True)
    (folder / f"0000:0{number}:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 16\n")


def test_cards_that_the_driver_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models = ["NVIDIA GeForce GTX 1060 6GB", "NVIDIA GeForce GTX 1050 Ti"]
    nodes = tmp_path / "dev"
    nodes.mkdir()
    for number, model in enumerate(models):
        card(tmp_path / "gpus", number, model)
    assert list_nvidia_gpus(tmp_path / "gpus", nodes) == []  # a container without a card
    (nodes / "nvidia0").touch()
    assert list_nvidia_gpus(tmp_path / "gpus", nodes) == models
    assert list_nvidia_gpus(tmp_path / "none", nodes) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user hides them
    assert list_nvidia_gpus(tmp_path / "gpus", nodes) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_cards_that_torch_cannot_use_are_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device(None) == torch.device("cpu")
    card(tmp_path, 1, "NVIDIA GeForce GTX 1060 6GB")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(select, "list_nvidia_gpus", lambda: list_nvidia_gpus(tmp_path, tmp_path))
    with pytest.raises(UsageError, match=r"GTX 1060 6GB, which torch .* cannot use; install a CUDA build .*cu126"):
        choose_device(None)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device cuda: torch sees no GPU here"):
        choose_device("cuda")
