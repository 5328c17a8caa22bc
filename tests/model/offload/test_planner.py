"""A budget that is kept: what the planner foretells is what is measured, and what it allows is not exceeded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import ldm_checkpoint
from tests.support.stage_peaks import interpolate_budget, measure_stage_peaks
from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.nn.chunked_attention import ChunkedAttnProcessor
from tinysd_batch.model.nn.vae_decoder import decode_single, use_strip_layers
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, feature_map_dtype
from tinysd_batch.model.pipeline import TinySD

TOKENS = 24
CASES = [
    ((32, 48), 1, None, "full"), ((16, 16), 2, 0.6, torch.bfloat16),
    pytest.param((32, 48), 3, 0.0, "full", marks=pytest.mark.slow),
    *(
        pytest.param(size, images, share, dtype, marks=pytest.mark.slow)
        for size, dtype in (((16, 16), "full"), ((96, 64), "full"), ((32, 32), torch.bfloat16))
        for images in (1, 4)
        for share in (None, 0.0, 0.5)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("size", "images", "share", "dtype"), CASES)
def test_what_is_foretold_is_measured(
    tiny_model: Path, size: tuple[int, int], images: int, share: float | None, dtype: torch.dtype | str
) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", dtype=dtype, vram_budget="1GB")
    shape, budget = MicroBatchShape(2 * images, *size, TOKENS, images + 1), None
    if share is not None:
        budget = interpolate_budget(share, model, shape)
        model = TinySD.from_pretrained(tiny_model, device="cpu", dtype=dtype, vram_budget=budget)
    foretold = {phase.name: phase.peak_bytes for phase in model.planner.plan_stages(shape)}
    measured = measure_stage_peaks(model, images, *size)
    on_host = 50_000 + images * 3 * size[0] * size[1] * 4  # here the host is the device: embeddings, and the pictures
    assert measured == pytest.approx(foretold, rel=0.1, abs=on_host)
    assert budget is None or max(measured.values()) <= 1.02 * budget + on_host


def test_what_was_foretold_before_and_is_known_is_measured_all_the_same(tiny_model: Path) -> None:
    """Only a process's first model works out its plan; the second has nothing left of learning its order of work."""
    shape = MicroBatchShape(2, 16, 16, TOKENS, 2)
    for _ in range(2):
        model = TinySD.from_pretrained(tiny_model, device="cpu", dtype="full", vram_budget="1GB")
        foretold = {phase.name: phase.peak_bytes for phase in model.planner.plan_stages(shape)}
        measured = measure_stage_peaks(model, 1, 16, 16)
        assert measured["text encoder"] == pytest.approx(foretold["text encoder"], rel=0.1)


@pytest.mark.slow
def test_more_room_never_means_more_streaming(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    shape = MicroBatchShape(4, 32, 32, TOKENS)
    least, whole = (
        model.planner.estimate_min_budget(shape),
        max(phase.peak_bytes for phase in model.planner.plan_stages(shape)),
    )
    passing = []
    for step in range(6):
        tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least + step * (whole - least) // 5)
        passing.append(sum(phase.weight_bytes - phase.resident_bytes for phase in tight.planner.plan_stages(shape)))
    assert passing == sorted(passing, reverse=True)
    assert passing[0] > 0 == passing[-1]


def test_maps_are_made_anew_only_where_nothing_else_fits(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", dtype="full", vram_budget="1GB")
    usual = model.planner.decode_stage(MicroBatchShape(1, 512, 512, 0))
    with torch.device("meta"):
        decoder = ldm_checkpoint.new_vae(
            ldm_checkpoint.SMALL
        )  # the tiny model's has so few levels that attention takes most
    use_strip_layers(decoder)
    decoder.set_attn_processor(ChunkedAttnProcessor(fused=True))

    def run(way: ExecutionStrategy) -> None:
        decode_single(decoder, torch.empty(1, 4, 64, 64), feature_map_dtype(way), recompute=way.recompute_maps)

    task = replace(usual, name="a decoder", run=run)
    least = {phase.strategy: phase.peak_bytes for phase in model.planner.candidate_plans(task, 0)}
    others = min(peak for way, peak in least.items() if not way.recompute_maps)
    assert min(least.values()) < 0.65 * others
    for budget, makes_anew in ((min(least.values()), True), (others - 1, True), (others, False), (2 * others, False)):
        model.planner.budget_bytes = budget
        model.planner.plans.clear()
        phase = model.planner.plan(task)
        assert phase.strategy.recompute_maps == makes_anew
        assert phase.peak_bytes <= budget


def test_a_budget_in_which_nothing_can_be_drawn_is_refused_and_the_least_is_said(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    side = model.info.native_px
    least = model.planner.estimate_min_budget(MicroBatchShape(1, side, side, TOKENS))
    with pytest.raises(ModelError, match=r"generating 16x16 takes at least \d+\.\d MB with this model, in the"):
        TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least - 1)
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least)
    tight.generate("cat", 1, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(UsageError, match=r"generating 128x128 takes at least"):
        tight.generate("cat", 1, num_inference_steps=2, height=128, width=128)


def test_a_share_of_the_device_and_headroom() -> None:
    from tinysd_batch.config import parse_memory_budget

    assert parse_memory_budget("0.25", 4000) == 1000
    assert parse_memory_budget("-1.5kB", 4000) == 2500
    assert parse_memory_budget("-0.25", 4000) == 3000
    assert parse_memory_budget("1GiB", 4000) == 2**30
    for wrong in ("0", "much", "-", "--5MB", "5 sheep"):
        with pytest.raises(UsageError, match="vram_budget"):
            parse_memory_budget(wrong, 4000)
