"""Memory budgets: stages take what the planner estimates, and stay within the budget."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import ldm_checkpoint
from tests.support.models.stage_peaks import interpolate_budget, measure_stage_peaks
from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.nn.chunked_attention import ChunkedAttnProcessor
from tinysd_batch.model.nn.vae_decoder import decode_single, use_strip_layers
from tinysd_batch.model.offload.stage_estimate import ExecutionStrategy, MicroBatchShape, feature_map_dtype
from tinysd_batch.model.tiny_sd import TinySD

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
def test_stages_take_what_was_estimated(
    tiny_model: Path, size: tuple[int, int], images: int, share: float | None, dtype: torch.dtype | str
) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", dtype=dtype, vram_budget="1GB")
    shape, budget = MicroBatchShape(2 * images, *size, TOKENS, images + 1), None
    if share is not None:
        budget = interpolate_budget(share, model, shape)
        model = TinySD.from_pretrained(tiny_model, device="cpu", dtype=dtype, vram_budget=budget)
    estimated = {plan.name: plan.peak_bytes for plan in model.planner.plan_stages(shape)}
    measured = measure_stage_peaks(model, images, *size)
    on_host = 50_000 + images * 3 * size[0] * size[1] * 4  # embeddings and images: here the host is the device
    assert measured == pytest.approx(estimated, rel=0.1, abs=on_host)
    assert budget is None or max(measured.values()) <= 1.02 * budget + on_host


def test_stages_take_what_was_estimated_when_the_estimate_is_cached(tiny_model: Path) -> None:
    """Only the first model of a process traces its stages; the second one must not be affected by the tracing."""
    shape = MicroBatchShape(2, 16, 16, TOKENS, 2)
    for _ in range(2):
        model = TinySD.from_pretrained(tiny_model, device="cpu", dtype="full", vram_budget="1GB")
        estimated = {plan.name: plan.peak_bytes for plan in model.planner.plan_stages(shape)}
        measured = measure_stage_peaks(model, 1, 16, 16)
        assert measured["text encoder"] == pytest.approx(estimated["text encoder"], rel=0.1)


@pytest.mark.slow
def test_larger_budgets_never_stream_more(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    shape = MicroBatchShape(4, 32, 32, TOKENS)
    minimum = model.planner.estimate_min_budget(shape)
    whole = max(plan.peak_bytes for plan in model.planner.plan_stages(shape))
    streamed_bytes = []
    for step in range(6):
        budget = minimum + step * (whole - minimum) // 5
        limited = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=budget)
        plans = limited.planner.plan_stages(shape)
        streamed_bytes.append(sum(plan.weight_bytes - plan.resident_bytes for plan in plans))
    assert streamed_bytes == sorted(streamed_bytes, reverse=True)
    assert streamed_bytes[0] > 0 == streamed_bytes[-1]


def test_maps_are_recomputed_only_if_nothing_else_fits(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", dtype="full", vram_budget="1GB")
    decode_stage = model.planner.decode_stage(MicroBatchShape(1, 512, 512, 0))
    with torch.device("meta"):
        # The tiny model's VAE has so few levels that attention needs most memory.
        decoder = ldm_checkpoint.new_vae(ldm_checkpoint.SMALL)
    use_strip_layers(decoder)
    decoder.set_attn_processor(ChunkedAttnProcessor(fused=True))

    def run(strategy: ExecutionStrategy) -> None:
        latents, dtype = torch.empty(1, 4, 64, 64), feature_map_dtype(strategy)
        decode_single(decoder, latents, dtype, recompute=strategy.recompute_maps)

    stage = replace(decode_stage, name="a decoder", run=run)
    peaks = {plan.strategy: plan.peak_bytes for plan in model.planner.candidate_plans(stage, 0)}
    minimum = min(peaks.values())
    stored = min(peak for strategy, peak in peaks.items() if not strategy.recompute_maps)
    assert minimum < 0.65 * stored
    for budget, recomputes in ((minimum, True), (stored - 1, True), (stored, False), (2 * stored, False)):
        model.planner.budget_bytes = budget
        model.planner.plans.clear()
        plan = model.planner.plan(stage)
        assert plan.strategy.recompute_maps == recomputes
        assert plan.peak_bytes <= budget


def test_budget_that_is_too_small_is_refused_with_the_minimum(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    side = model.info.native_px
    minimum = model.planner.estimate_min_budget(MicroBatchShape(1, side, side, TOKENS))
    with pytest.raises(ModelError, match=r"generating 16x16 takes at least \d+\.\d MB with this model, in the"):
        TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=minimum - 1)
    limited = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=minimum)
    limited.generate("cat", 1, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(UsageError, match=r"generating 128x128 takes at least"):
        limited.generate("cat", 1, num_inference_steps=2, height=128, width=128)


def test_budgets_as_a_share_or_as_headroom() -> None:
    from tinysd_batch.settings.memory_budget import parse_budget

    assert parse_budget("0.25").resolve(4000) == 1000
    assert parse_budget("-1.5kB").resolve(4000) == 2500
    assert parse_budget("-0.25").resolve(4000) == 3000
    assert parse_budget("1GiB").resolve(4000) == 2**30
    for wrong in ("0", "much", "-", "--5MB", "5 sheep"):
        with pytest.raises(UsageError, match="vram_budget"):
            parse_budget(wrong).resolve(4000)
