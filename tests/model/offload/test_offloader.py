"""Components on the device: resident, or streamed through two buffers. On the CPU the device is memory."""

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
    """A model with a budget that everything fits, so that its layers are divided into groups."""
    return TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")


def limit_weights(path: Path, share: float, strategy: ExecutionStrategy | None = None, **options: object) -> TinySD:
    """Load a model whose weight budget is between the minimum for streaming (0) and all weights (1)."""
    limited = TinySD.from_pretrained(path, device="cpu", vram_budget="1GB", **options)  # type: ignore[arg-type]
    plan_unlimited = limited.planner.plan

    def plan(stage: Stage) -> StagePlan:
        whole = sum(component.nbytes for component in stage.components)
        buffers = 2 * largest_group_bytes(stage.components)
        minimum = sum(component.resident.nbytes for component in stage.components) + buffers
        weight_budget = int(minimum + share * (whole - minimum))
        chosen = strategy or stage.strategies[0]
        return replace(plan_unlimited(stage), weight_budget_bytes=weight_budget, strategy=chosen)

    limited.planner.plan = plan  # type: ignore[assignment, method-assign]
    return limited


def generate(model: TinySD, **options: object) -> torch.Tensor:
    images = model.generate(["cat", "a dog"], [1, 2], num_inference_steps=3, output_type="np", **options).images  # type: ignore[arg-type]
    return torch.from_numpy(images)


@pytest.mark.parametrize("share", SHARES)
def test_streamed_and_resident_weights_give_identical_images(tiny_model: Path, model: TinySD, share: float) -> None:
    limited = limit_weights(tiny_model, share)
    assert torch.equal(generate(limited), generate(model))
    _, buffer_bytes = limited.offloader.estimate_placement(limited.fragments[3:], limited.offloader.weight_budget_bytes)
    assert buffer_bytes > 0


def test_estimating_a_placement_changes_no_budget(model: TinySD) -> None:
    before = model.offloader.weight_budget_bytes
    model.offloader.estimate_placement(model.fragments[3:], 12345)
    assert model.offloader.weight_budget_bytes == before


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_layers_that_are_called_alternately_are_fetched_once(
    tiny_model: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = limit_weights(tiny_model, share, ExecutionStrategy(chunk_bytes=2000, recompute_maps=True))
    fetched: list[int] = []
    fetch = LayerStream.fetch

    def record(stream: LayerStream, number: int, slot: int) -> None:
        fetched.append(number)
        fetch(stream, number, slot)

    monkeypatch.setattr(LayerStream, "fetch", record)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        streamed = limited.decode_pixels(latents)
    assert fetched == [*range(max(fetched) + 1), 0]
    monkeypatch.undo()
    with torch.no_grad():
        resident = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB").decode_pixels(latents)
    torch.testing.assert_close(streamed, resident, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_groups_are_fetched_again_for_every_chunk_of_rows(tiny_model: Path, rows: int) -> None:
    limited = limit_weights(tiny_model, 0.0, unet_bs=rows)
    unlimited = TinySD.from_pretrained(tiny_model, device="cpu", unet_bs=rows)
    assert torch.equal(generate(limited), generate(unlimited))


def test_weights_in_another_dtype_are_streamed_without_a_budget(
    float_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelInfo, "is_small", False)
    half = TinySD.from_pretrained(float_model, device="cpu", dtype=torch.bfloat16)
    resident = generate(half)
    monkeypatch.setattr(offloader, "MAX_RESIDENT_COPY_BYTES", 0)
    assert all(half.offloader.should_stream([component], None) for component in half.fragments)
    assert torch.equal(generate(half), resident)


def test_offloaded_components_cannot_compute(model: TinySD) -> None:
    for layer, x in ((model.unet.conv_in, torch.zeros(1, 4, 8, 8)), (model.unet.conv_out, torch.zeros(1, 32, 8, 8))):
        with pytest.raises(RuntimeError):
            layer(x)


def test_streamed_layers_cannot_compute_after_their_turn(tiny_model: Path) -> None:
    streamed = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    streamed.offloader.stream_all_weights = True
    x = torch.zeros(1, 4, 8, 8)
    with streamed.offloader.holding(streamed.encode_fragment, streamed.decode_fragment):
        streamed.unet.conv_in(x)
        streamed.unet.conv_out(torch.zeros(1, 32, 8, 8))
        with pytest.raises(RuntimeError):
            torch.nn.Conv2d.forward(streamed.unet.conv_in, x)  # without the hook that fetches its weights


def test_pinned_weights_hold_every_group_in_the_device_dtype(model: TinySD) -> None:
    component: Component = model.decode_fragment
    pinned = PinnedWeights.copy_of(component.groups)
    for number, group in enumerate(component.groups):
        for tensor, view in group.views(pinned.group_bytes(number, group.nbytes)):
            assert torch.equal(view, tensor.value.to(tensor.dtype))


def test_pinned_weights_are_not_used_for_other_groups_of_equal_size(model: TinySD) -> None:
    """Under another budget other layers are streamed, and some sets of layers have equal size."""
    component: Component = model.decode_fragment
    pinned = PinnedWeights.copy_of(component.groups)
    assert pinned.is_copy_of(component.groups)
    assert not pinned.is_copy_of(component.groups[::-1])
    assert not pinned.is_copy_of(component.groups[:-1])
    component.set_dtype(torch.bfloat16)
    assert not pinned.is_copy_of(component.groups)
    component.set_dtype(model.dtype)
    assert pinned.is_copy_of(component.groups)


def test_steps_work_as_before_after_an_aborted_capture(tiny_model: Path) -> None:
    streamed = limit_weights(tiny_model, 0.0)
    streamed.offloader.stream_all_weights = True
    latents, context, time = torch.randn(2, 4, 8, 8), torch.randn(2, 22, 32), torch.tensor(500.0)

    def refuse(_: LayerStream) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    def abort_capture() -> None:
        with pytest.MonkeyPatch.context() as patch, streamed.offloader.capturing(2):
            patch.setattr(LayerStream, "close", refuse)
            streamed.predict_noise(latents, time, context)

    with torch.no_grad(), streamed.offloader.holding(streamed.encode_fragment, streamed.decode_fragment):
        expected = [streamed.predict_noise(latents, time, context) for _ in range(2)][1]
        with pytest.raises(RuntimeError, match="previous error"):
            abort_capture()
        assert streamed.offloader.stream is not None
        assert streamed.offloader.stream.begins
        assert streamed.offloader.stream.last_switch is None
        assert torch.equal(streamed.predict_noise(latents, time, context), expected)


def test_captured_step_fetches_each_group_once_and_leaves_no_copy_pending(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = limit_weights(tiny_model, 0.0)
    streamed.offloader.stream_all_weights = True
    latents, context, time = torch.randn(2, 4, 8, 8), torch.randn(2, 22, 32), torch.tensor(500.0)
    fetch, fetched = LayerStream.fetch, []

    def record(stream: LayerStream, number: int, slot: int) -> None:
        fetched.append(number)
        fetch(stream, number, slot)

    monkeypatch.setattr(LayerStream, "fetch", record)
    with torch.no_grad(), streamed.offloader.holding(streamed.encode_fragment, streamed.decode_fragment):
        outputs = [streamed.predict_noise(latents, time, context) for _ in range(2)]
        fetched.clear()
        with streamed.offloader.capturing(2):
            outputs.append(streamed.predict_noise(latents, time, context))
        assert fetched == list(range(len(fetched)))
        assert len(fetched) > 2
        outputs.append(streamed.predict_noise(latents, time, context))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
