"""What only a CUDA device can tell: run with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from tinysd_batch import TinySD

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("dtype", "tolerance"), [("full", 1e-2), ("autocast", 1e-1)])
def test_the_same_picture_as_on_the_cpu(dtype: str, tolerance: float) -> None:
    options = {"num_inference_steps": 10, "output_type": "np"}
    expected = TinySD.from_pretrained("embedded", device="cpu").generate("red apple", 7, **options).images  # type: ignore[arg-type]
    found = TinySD.from_pretrained("embedded", device="cuda", dtype=dtype).generate("red apple", 7, **options).images  # type: ignore[arg-type]
    assert abs(found - expected).mean() < tolerance


def test_a_tight_budget_changes_no_bit_and_leaves_the_card_empty(tiny_model: Path) -> None:
    roomy = TinySD.from_pretrained(tiny_model, device="cuda")
    tight = TinySD.from_pretrained(
        tiny_model, device="cuda", vram_budget=max(fragment.nbytes for fragment in roomy.fragments)
    )
    pictures = [model.generate("cat", 1, output_type="np").images for model in (roomy, tight)]
    assert (pictures[0] == pictures[1]).all()
    assert not any(fragment.is_onloaded for fragment in tight.fragments)
