import pytest
import torch

from tinysd_batch.errors import UsageError
from tinysd_batch.model import precision
from tinysd_batch.model.precision import Probe, choose_dtype

CPU, CARD = torch.device("cpu"), torch.device("cuda")


def test_a_probe_measures_this_processor() -> None:
    found = precision.probe(CPU, torch.bfloat16)
    assert found.is_right
    assert found.speedup > 0


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", Probe(True, 2.1), torch.float16),
        ("NVIDIA GeForce GTX 1060 6GB", Probe(True, 0.1), torch.float32),  # right, but slow
        ("NVIDIA GeForce GTX 1650", Probe(True, 1.9), torch.float32),  # known to fail elsewhere
        ("a card with broken convolutions", Probe(False, 2.0), torch.float32),
    ],
)
def test_half_precision_only_where_it_is_right_and_fast(
    monkeypatch: pytest.MonkeyPatch, name: str, found: Probe, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "probe", lambda *_: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert choose_dtype(None, CARD) is expected
    assert choose_dtype("autocast", CARD) is torch.float16
    assert choose_dtype("full", CARD) is torch.float32


@pytest.mark.parametrize(("speedup", "expected"), [(3.0, torch.bfloat16), (0.2, torch.float32)])
def test_processors_use_bfloat16_for_large_models_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, speedup: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "probe", lambda *_: Probe(True, speedup))
    assert choose_dtype(None, CPU) is expected
    assert choose_dtype(None, CPU, is_small=True) is torch.float32
    assert choose_dtype("full", CPU) is torch.float32


def test_what_is_no_format() -> None:
    with pytest.raises(UsageError, match="int4"):
        choose_dtype("int4", CPU)
