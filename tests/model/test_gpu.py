"""What only a CUDA device can tell: run with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from tinysd_batch import TinySD
from tinysd_batch.model.packing import has_kernels
from tinysd_batch.model.precision import choose_dtype, probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("dtype", "tolerance"), [("full", 1e-2), ("autocast", 1e-1)])
def test_the_same_picture_as_on_the_cpu(dtype: str, tolerance: float) -> None:
    options = {"num_inference_steps": 10, "output_type": "np"}
    expected = TinySD.from_pretrained("embedded", device="cpu").generate("red apple", 7, **options).images  # type: ignore[arg-type]
    found = TinySD.from_pretrained("embedded", device="cuda", dtype=dtype).generate("red apple", 7, **options).images  # type: ignore[arg-type]
    assert abs(found - expected).mean() < tolerance


def test_a_tight_budget_changes_no_bit_and_leaves_the_card_empty(tiny_model: Path) -> None:
    roomy = TinySD.from_pretrained(tiny_model, device="cuda", vram_budget="1GB")
    tight = TinySD.from_pretrained(tiny_model, device="cuda", vram_budget="1GB")
    tight.residency.streams_all = True
    pictures = [model.generate("cat", [1, 2], output_type="np").images for model in (roomy, tight)]
    assert (pictures[0] == pictures[1]).all()
    assert not any(fragment.is_onloaded for fragment in tight.fragments)


def test_this_card_compiles_kernels_that_unpack_to_the_bit() -> None:
    assert has_kernels(torch.device("cuda", torch.cuda.current_device()))


def test_the_probe_tells_whether_half_precision_pays() -> None:
    found = probe(torch.device("cuda"), torch.float16)
    assert found.speedup > 0
    assert found.is_right or choose_dtype(None, torch.device("cuda")) is torch.float32
