"""What can go wrong on a card, on one that is pretended."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.card import graphs
from tests.card.allocator import USUAL
from tests.card.card import CONTEXT_BYTES, Card
from tests.tools import Quiet, check_whole, setup_for, write_csv
from tinysd_batch import TinySD
from tinysd_batch.config import Settings
from tinysd_batch.job.driver import run_job
from tinysd_batch.job.folder import open_job
from tinysd_batch.job.pool import InlinePool
from tinysd_batch.model import pipeline
from tinysd_batch.model.graphs import CapturedStep, on_working_stream
from tinysd_batch.model.memory import Phase, Planner, Shape, Way
from tinysd_batch.model.unet import predict

MIB = 2**20
STEPS = 9  # so many that graphs pay


def new_model(path: Path, **options: Any) -> TinySD:
    return TinySD.from_pretrained(path, device="cuda", **{"dtype": "full", "vram_budget": "2GB", **options})


def pictures(model: TinySD, **options: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    made: np.ndarray[Any, np.dtype[np.float32]] = model.generate(
        ["cat", "a dog"], [1, 2], num_inference_steps=STEPS, output_type="np", **options
    ).images
    return made


@contextmanager
def issued() -> Iterator[None]:
    """Steps are not captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "WORTH_IT", STEPS + 2)
        yield


def pools(card: Card) -> set[tuple[int, int]]:
    return {segment.pool for segment in card.allocator.segments}


@pytest.mark.parametrize("streams", [False, True])
def test_a_step_that_cannot_be_captured_is_issued_and_leaves_nothing_behind(
    pretended_card: Card, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    model = new_model(tiny_model)
    model.residency.streams_all = streams
    with issued():
        expected = pictures(model)

    def looked_at(*given: Any) -> torch.Tensor:
        said = predict(*given)
        said.sum().item()
        return said

    monkeypatch.setattr(pipeline, "predict", looked_at)
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["captured"] == 0
    assert not pretended_card.allocator.underway
    torch.cuda.empty_cache()
    assert pools(pretended_card) <= {USUAL}
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["begun"] == 1  # what could not be captured is not tried again


def test_where_a_graph_does_not_fit_steps_are_issued(
    pretended_card: Card, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model, vram_budget=CONTEXT_BYTES + 80 * MIB)
    expected = pictures(model)
    assert pretended_card.counts["replayed"] > 1
    monkeypatch.setattr(graphs, "BYTES_EACH", MIB)
    pretended_card.counts.clear()
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["replayed"] == 1  # the one that was compared
    assert pretended_card.allocator.others == CONTEXT_BYTES


def test_memory_that_runs_out_in_a_capture_costs_the_graph_only(
    pretended_card: Card, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model, vram_budget=None)
    with issued():
        expected = pictures(model)
    begin = graphs.Graph.capture_begin

    def without_room(graph: graphs.Graph, *given: Any, **options: Any) -> None:
        begin(graph, *given, **options)
        pretended_card.allocator.limit = 0

    monkeypatch.setattr(graphs.Graph, "capture_begin", without_room)
    end = graphs.Graph.capture_end

    def with_room(graph: graphs.Graph) -> None:
        pretended_card.allocator.limit = pretended_card.allocator.total
        end(graph)

    monkeypatch.setattr(graphs.Graph, "capture_end", with_room)
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["replayed"] == 0
    torch.cuda.empty_cache()
    assert pools(pretended_card) <= {USUAL}


def test_a_graph_that_says_something_else_is_not_used(
    pretended_card: Card, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(tiny_model)
    with issued():
        expected = pictures(model)
    replay = CapturedStep.replay
    monkeypatch.setattr(CapturedStep, "replay", lambda step, latents: replay(step, latents) + 1e-6)
    assert (pictures(model) == expected).all()
    assert pretended_card.counts["replayed"] == 1


def test_page_locked_memory_is_let_go_of_when_nobody_reads_it_any_more(pretended_card: Card, tiny_model: Path) -> None:
    model = new_model(tiny_model)
    model.residency.streams_all = True
    pictures(model)
    assert len(pretended_card.locked) == 3  # of the text encoder, the UNet, the VAE
    del model
    gc.collect()
    assert not pretended_card.locked


def test_copies_have_a_stream_of_their_own_however_many_phases(pretended_card: Card, tiny_model: Path) -> None:
    """Torch has 32 streams and hands them out in turn."""
    model = new_model(tiny_model)
    model.residency.streams_all = True
    met = set()
    with on_working_stream(model.device):
        working = torch.cuda.current_stream().cuda_stream
        for _ in range(40):
            with model.residency.holding(model.vae_fragment):
                stream = model.residency.stream
                assert stream is not None
                assert stream.copying is not None
                met.add(stream.copying.cuda_stream)
    assert working not in met


def test_a_job_on_a_small_card_saves_memory_and_draws_everything(
    pretended_card: Card, tiny_model: Path, tmp_path: Path
) -> None:
    allocator = pretended_card.allocator
    manifest = write_csv(tmp_path / "m.csv", [{"prompt": "cat", "seed": 1, "n_samples": 4, "width": 96, "height": 96}])

    def draw(name: str) -> list[dict[str, Any]]:
        torch.cuda.empty_cache()
        allocator.most_allocated = 0
        job = open_job(manifest, tmp_path / name, Settings(model=str(tiny_model), steps=2))
        setup = replace(setup_for(job), device="cuda", precision="full")
        run_job(job, lambda _: InlinePool(setup), Quiet(), lambda: False, None)
        rows = check_whole(tmp_path / name, 4)
        assert {(row["status"], row["device_name"]) for row in rows} == {("ok", "a pretended card")}
        return rows

    assert not any(row["degraded"] for row in draw("large"))
    allocator.total = allocator.limit = CONTEXT_BYTES + allocator.most_allocated - 1
    assert any(row["degraded"] for row in draw("small"))


@pytest.mark.parametrize("dtype", ["full", "autocast"])
def test_a_plan_for_the_card_is_what_it_takes(
    pretended_card: Card, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Of each phase: all tensors alive, cuBLAS' workspace among them, and what torch reserves for them."""
    model = new_model(tiny_model, dtype=dtype, vram_budget=CONTEXT_BYTES + 96 * MIB)
    planned = {phase.name: phase for phase in model.memory.phases(Shape(4, 64, 64, model.info.max_tokens, 3))}
    measured: dict[str, tuple[int, int]] = {}
    working = Planner.working

    @contextmanager
    def watched(planner: Planner, phase: Phase) -> Iterator[Way]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with working(planner, phase) as way:
            yield way
        measured[phase.name] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    monkeypatch.setattr(Planner, "working", watched)
    model.generate(["cat", "a dog"], [1, 2], num_inference_steps=3, height=64, width=64)
    assert measured.keys() == planned.keys()
    for name, (allocated, reserved) in measured.items():
        phase = planned[name]
        own = phase.staying + phase.buffers + phase.work + model.memory.overhead.workspace
        assert allocated == pytest.approx(own, rel=0.1, abs=300_000), name
        assert reserved <= phase.peak - model.memory.overhead.context, name
