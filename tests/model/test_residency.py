"""Fragments on the device, whole or piece by piece through two buffers. On the CPU the device is memory."""

from pathlib import Path

import pytest
import torch

from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model import residency
from tinysd_batch.model.fragments import Fragment
from tinysd_batch.model.info import ModelInfo
from tinysd_batch.model.residency import Arena, largest_piece

SHARES = [0.0, 0.1, 0.5, 0.9, 0.999]  # of the way from the least budget to one that holds everything


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TinySD:
    """With room for everything, and pieces all the same."""
    return TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")


def least_budget(model: TinySD) -> int:
    phases = [model.fragments[:1], model.fragments[1:3], model.fragments[3:]]
    return max(sum(part.standing.nbytes for part in phase) + 2 * largest_piece(phase) for phase in phases)


def budget(model: TinySD, share: float) -> int:
    """Between what the hungriest phase takes at least, and what it would take as a whole."""
    whole = sum(part.nbytes for part in model.fragments[1:3])
    return int(least_budget(model) + share * (whole - least_budget(model)))


def picture(model: TinySD, **options: object) -> torch.Tensor:
    made = model.generate(["cat", "a dog"], [1, 2], num_inference_steps=3, output_type="np", **options).images  # type: ignore[arg-type]
    return torch.from_numpy(made)


@pytest.mark.parametrize("share", SHARES)
def test_streamed_and_resident_give_the_same_bits(tiny_model: Path, model: TinySD, share: float) -> None:
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=budget(model, share))
    assert tight.residency.streams(tight.fragments[1:3])
    assert not model.residency.streams(model.fragments[1:3])
    assert torch.equal(picture(tight), picture(model))


@pytest.mark.parametrize("share", SHARES)
def test_the_weights_on_the_device_stay_within_the_budget(tiny_model: Path, model: TinySD, share: float) -> None:
    allowed = budget(model, share)
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=allowed)
    seen: list[int] = []

    def count(*_: object) -> None:
        here = [tensor.nbytes for part in tight.fragments for tensor in part.host if tensor.is_onloaded]
        seen.append(sum(here) + largest_piece(tight.fragments[1:3]))  # and the buffer that is being filled

    for module in tight.unet.modules():
        if not any(module.children()):
            module.register_forward_pre_hook(count)
    picture(tight)
    assert 0 < max(seen) <= allowed
    assert not any(part.is_onloaded for part in tight.fragments)


@pytest.mark.parametrize("rows", [1, 3])
def test_pieces_that_are_needed_again_come_again(tiny_model: Path, model: TinySD, rows: int) -> None:
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least_budget(model), unet_bs=rows)
    roomy = TinySD.from_pretrained(tiny_model, device="cpu", unet_bs=rows)
    assert torch.equal(picture(tight), picture(roomy))


def test_what_the_file_holds_otherwise_is_streamed_without_a_budget(
    float_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelInfo, "is_small", False)
    half = TinySD.from_pretrained(float_model, device="cpu", dtype=torch.bfloat16)
    whole = picture(half)
    monkeypatch.setattr(residency, "COPIED_WHOLE_BYTES", 0)
    assert all(half.residency.streams([part]) for part in half.fragments)
    assert torch.equal(picture(half), whole)


def test_a_fragment_that_is_away_cannot_compute(model: TinySD) -> None:
    for layer, x in ((model.unet.conv_in, torch.zeros(1, 4, 8, 8)), (model.unet.conv_out, torch.zeros(1, 32, 8, 8))):
        with pytest.raises(RuntimeError):
            layer(x)


def test_a_piece_that_has_passed_cannot_compute(tiny_model: Path, model: TinySD) -> None:
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least_budget(model))
    x = torch.zeros(1, 4, 8, 8)
    with tight.residency.holding(tight.encode_fragment, tight.decode_fragment):
        tight.unet.conv_in(x)
        tight.unet.conv_out(torch.zeros(1, 32, 8, 8))
        passed = tight.unet.conv_in
        with pytest.raises(RuntimeError):
            torch.nn.Conv2d.forward(passed, x)


def test_a_budget_below_two_buffers_is_refused_and_the_least_is_said(tiny_model: Path, model: TinySD) -> None:
    with pytest.raises(ModelError, match=r"needs \d+\.\d MB for weights"):
        TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least_budget(model) - 1)


def test_an_arena_holds_every_piece_as_the_device_wants_it(model: TinySD) -> None:
    fragment: Fragment = model.decode_fragment
    arena = Arena.of(fragment.pieces, pinned=False)
    for number, piece in enumerate(fragment.pieces):
        for tensor, place in piece.views(arena.piece(number, piece.nbytes)):
            assert torch.equal(place, tensor.value.to(tensor.dtype))
