"""Fragments on the device, whole or piece by piece through two buffers. On the CPU the device is memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinysd_batch import TinySD
from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.model.offload import offloader
from tinysd_batch.model.offload.components import Component
from tinysd_batch.model.offload.layer_stream import LayerStream
from tinysd_batch.model.offload.offloader import largest_group_bytes
from tinysd_batch.model.offload.pinned import PinnedWeights
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, Stage, StagePlan

SHARES = [0.0, 0.5, 0.999]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TinySD:
    """With room for everything, and pieces all the same."""
    return TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")


def with_room(model: Path, share: float, way: ExecutionStrategy | None = None, **options: object) -> TinySD:
    """A model whose weights have room between what streaming takes at least and what they take as a whole."""
    tight = TinySD.from_pretrained(model, device="cpu", vram_budget="1GB", **options)  # type: ignore[arg-type]
    phase_of = tight.planner.plan

    def phase(task: Stage) -> StagePlan:
        whole = sum(part.nbytes for part in task.components)
        least = sum(part.resident.nbytes for part in task.components) + 2 * largest_group_bytes(task.components)
        return replace(
            phase_of(task), weight_budget_bytes=int(least + share * (whole - least)), strategy=way or task.strategies[0]
        )

    tight.planner.plan = phase  # type: ignore[assignment, method-assign]
    return tight


def picture(model: TinySD, **options: object) -> torch.Tensor:
    made = model.generate(["cat", "a dog"], [1, 2], num_inference_steps=3, output_type="np", **options).images  # type: ignore[arg-type]
    return torch.from_numpy(made)


@pytest.mark.parametrize("share", SHARES)
def test_streamed_and_resident_give_the_same_bits(tiny_model: Path, model: TinySD, share: float) -> None:
    tight = with_room(tiny_model, share)
    assert torch.equal(picture(tight), picture(model))
    assert tight.offloader.estimate_placement(tight.fragments[3:], tight.offloader.weight_budget_bytes)[1] > 0


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_layers_that_work_by_turns_come_once(tiny_model: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = with_room(tiny_model, share, ExecutionStrategy(chunk_bytes=2000, recompute_maps=True))
    fetched: list[int] = []
    fetch = LayerStream.fetch

    def counted(stream: LayerStream, number: int, slot: int) -> None:
        fetched.append(number)
        fetch(stream, number, slot)

    monkeypatch.setattr(LayerStream, "fetch", counted)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        streamed = tight.decode_pixels(latents)
    assert fetched == [*range(max(fetched) + 1), 0]
    monkeypatch.undo()
    with torch.no_grad():
        resident = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB").decode_pixels(latents)
    torch.testing.assert_close(streamed, resident, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_pieces_that_are_needed_again_come_again(tiny_model: Path, rows: int) -> None:
    tight, roomy = (
        with_room(tiny_model, 0.0, unet_bs=rows),
        TinySD.from_pretrained(tiny_model, device="cpu", unet_bs=rows),
    )
    assert torch.equal(picture(tight), picture(roomy))


def test_what_the_file_holds_otherwise_is_streamed_without_a_budget(
    float_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelInfo, "is_small", False)
    half = TinySD.from_pretrained(float_model, device="cpu", dtype=torch.bfloat16)
    whole = picture(half)
    monkeypatch.setattr(offloader, "MAX_RESIDENT_COPY_BYTES", 0)
    assert all(half.offloader.should_stream([part], None) for part in half.fragments)
    assert torch.equal(picture(half), whole)


def test_a_fragment_that_is_away_cannot_compute(model: TinySD) -> None:
    for layer, x in ((model.unet.conv_in, torch.zeros(1, 4, 8, 8)), (model.unet.conv_out, torch.zeros(1, 32, 8, 8))):
        with pytest.raises(RuntimeError):
            layer(x)


def test_a_piece_that_has_passed_cannot_compute(tiny_model: Path) -> None:
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    tight.offloader.stream_all_weights = True
    x = torch.zeros(1, 4, 8, 8)
    with tight.offloader.holding(tight.encode_fragment, tight.decode_fragment):
        tight.unet.conv_in(x)
        tight.unet.conv_out(torch.zeros(1, 32, 8, 8))
        passed = tight.unet.conv_in
        with pytest.raises(RuntimeError):
            torch.nn.Conv2d.forward(passed, x)


def test_an_arena_holds_every_piece_as_the_device_wants_it(model: TinySD) -> None:
    fragment: Component = model.decode_fragment
    arena = PinnedWeights.copy_of(fragment.groups)
    for number, piece in enumerate(fragment.groups):
        for tensor, place in piece.views(arena.group_bytes(number, piece.nbytes)):
            assert torch.equal(place, tensor.value.to(tensor.dtype))


def test_an_arena_does_not_serve_others_that_are_as_large(model: TinySD) -> None:
    """In another room other layers pass, and some sets of layers weigh the same."""
    fragment: Component = model.decode_fragment
    arena = PinnedWeights.copy_of(fragment.groups)
    assert arena.is_copy_of(fragment.groups)
    assert not arena.is_copy_of(fragment.groups[::-1])
    assert not arena.is_copy_of(fragment.groups[:-1])
    fragment.set_dtype(torch.bfloat16)
    assert not arena.is_copy_of(fragment.groups)
    fragment.set_dtype(model.dtype)
    assert arena.is_copy_of(fragment.groups)


def test_after_a_capture_that_broke_off_steps_are_as_ever(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = with_room(tiny_model, 0.0)
    tight.offloader.stream_all_weights = True
    latents, context, time = torch.randn(2, 4, 8, 8), torch.randn(2, 22, 32), torch.tensor(500.0)

    def refuse(_: LayerStream) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    def broken_off() -> None:
        with pytest.MonkeyPatch.context() as patch, tight.offloader.capturing(2):
            patch.setattr(LayerStream, "close", refuse)
            tight.predict_noise(latents, time, context)

    with torch.no_grad(), tight.offloader.holding(tight.encode_fragment, tight.decode_fragment):
        expected = [tight.predict_noise(latents, time, context) for _ in range(2)][1]
        with pytest.raises(RuntimeError, match="previous error"):
            broken_off()
        assert tight.offloader.stream is not None
        assert tight.offloader.stream.begins
        assert tight.offloader.stream.last_switch is None
        assert torch.equal(tight.predict_noise(latents, time, context), expected)


def test_a_captured_step_copies_each_piece_once_and_leaves_nothing_under_way(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = with_room(tiny_model, 0.0)
    tight.offloader.stream_all_weights = True
    latents, context, time = torch.randn(2, 4, 8, 8), torch.randn(2, 22, 32), torch.tensor(500.0)
    fetch, fetched = LayerStream.fetch, []

    def watched(stream: LayerStream, number: int, slot: int) -> None:
        fetched.append(number)
        fetch(stream, number, slot)

    monkeypatch.setattr(LayerStream, "fetch", watched)
    with torch.no_grad(), tight.offloader.holding(tight.encode_fragment, tight.decode_fragment):
        said = [tight.predict_noise(latents, time, context) for _ in range(2)]
        fetched.clear()
        with tight.offloader.capturing(2):
            said.append(tight.predict_noise(latents, time, context))
        assert fetched == list(range(len(fetched)))
        assert len(fetched) > 2
        said.append(tight.predict_noise(latents, time, context))
    assert all(torch.equal(one, said[0]) for one in said)
