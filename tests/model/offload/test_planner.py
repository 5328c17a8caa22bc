"""A budget that is kept: what the planner foretells is what is measured, and what it allows is not exceeded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import ldm_checkpoint
from tests.support.stage_peaks import budget_at, measured_peaks
from tinysd_batch.errors import ModelError, UsageError
from tinysd_batch.model.nn.chunked_attention import PartedAttention
from tinysd_batch.model.nn.vae_decoder import decode_one, use_strip_layers
from tinysd_batch.model.offload.stage_estimate import Shape, Way, kept_type
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
    shape, budget = Shape(2 * images, *size, TOKENS, images + 1), None
    if share is not None:
        budget = budget_at(share, model, shape)
        model = TinySD.from_pretrained(tiny_model, device="cpu", dtype=dtype, vram_budget=budget)
    foretold = {phase.name: phase.peak for phase in model.memory.phases(shape)}
    measured = measured_peaks(model, images, *size)
    on_host = 50_000 + images * 3 * size[0] * size[1] * 4  # here the host is the device: embeddings, and the pictures
    assert measured == pytest.approx(foretold, rel=0.1, abs=on_host)
    assert budget is None or max(measured.values()) <= 1.02 * budget + on_host


def test_what_was_foretold_before_and_is_known_is_measured_all_the_same(tiny_model: Path) -> None:
    """Only a process's first model works out its plan; the second has nothing left of learning its order of work."""
    shape = Shape(2, 16, 16, TOKENS, 2)
    for _ in range(2):
        model = TinySD.from_pretrained(tiny_model, device="cpu", dtype="full", vram_budget="1GB")
        foretold = {phase.name: phase.peak for phase in model.memory.phases(shape)}
        measured = measured_peaks(model, 1, 16, 16)
        assert measured["text encoder"] == pytest.approx(foretold["text encoder"], rel=0.1)


@pytest.mark.slow
def test_more_room_never_means_more_streaming(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    shape = Shape(4, 32, 32, TOKENS)
    least, whole = model.memory.least(shape), max(phase.peak for phase in model.memory.phases(shape))
    passing = []
    for step in range(6):
        tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least + step * (whole - least) // 5)
        passing.append(sum(phase.weights - phase.staying for phase in tight.memory.phases(shape)))
    assert passing == sorted(passing, reverse=True)
    assert passing[0] > 0 == passing[-1]


def test_maps_are_made_anew_only_where_nothing_else_fits(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", dtype="full", vram_budget="1GB")
    usual = model.memory.decoding(Shape(1, 512, 512, 0))
    with torch.device("meta"):
        decoder = ldm_checkpoint.new_vae(
            ldm_checkpoint.SMALL
        )  # the tiny model's has so few levels that attention takes most
    use_strip_layers(decoder)
    decoder.set_attn_processor(PartedAttention(fused=True))

    def run(way: Way) -> None:
        decode_one(decoder, torch.empty(1, 4, 64, 64), kept_type(way), makes_anew=way.makes_anew)

    task = replace(usual, name="a decoder", run=run)
    least = {phase.way: phase.peak for phase in model.memory.candidates(task, 0)}
    others = min(peak for way, peak in least.items() if not way.makes_anew)
    assert min(least.values()) < 0.65 * others
    for budget, makes_anew in ((min(least.values()), True), (others - 1, True), (others, False), (2 * others, False)):
        model.memory.budget_bytes = budget
        model.memory.known.clear()
        phase = model.memory.phase(task)
        assert phase.way.makes_anew == makes_anew
        assert phase.peak <= budget


def test_a_budget_in_which_nothing_can_be_drawn_is_refused_and_the_least_is_said(tiny_model: Path) -> None:
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    side = model.info.native_px
    least = model.memory.least(Shape(1, side, side, TOKENS))
    with pytest.raises(ModelError, match=r"drawing 16x16 takes at least \d+\.\d MB with this model, in the"):
        TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least - 1)
    tight = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget=least)
    tight.generate("cat", 1, num_inference_steps=2, guidance_scale=1.0)
    with pytest.raises(UsageError, match=r"drawing 128x128 takes at least"):
        tight.generate("cat", 1, num_inference_steps=2, height=128, width=128)


def test_a_share_of_the_device_and_headroom() -> None:
    from tinysd_batch.config import parse_budget

    assert parse_budget("0.25", 4000) == 1000
    assert parse_budget("-1.5kB", 4000) == 2500
    assert parse_budget("-0.25", 4000) == 3000
    assert parse_budget("1GiB", 4000) == 2**30
    for wrong in ("0", "much", "-", "--5MB", "5 sheep"):
        with pytest.raises(UsageError, match="vram_budget"):
            parse_budget(wrong, 4000)
