"""That the pretended card does not forgive: of a card that does, nothing could be learnt."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support.fake_cuda import device as card_module
from tests.support.fake_cuda.allocator import DEFAULT_POOL, FakeCachingAllocator
from tests.support.fake_cuda.device import FakeCudaDevice, FakeEvent, FakeStream
from tests.support.fake_cuda.graphs import CaptureError
from tests.support.fake_cuda.patch import use_fake_cuda
from tests.support.fake_cuda.race_detector import DataRaceError, StreamTimeline

MIB = 2**20


@pytest.fixture
def card() -> Iterator[FakeCudaDevice]:
    if torch.cuda.is_available():
        pytest.skip("there is a real card")
    with use_fake_cuda(FakeCudaDevice()) as made:
        yield made


def on_card(card: FakeCudaDevice, values: list[float]) -> Tensor:
    return torch.tensor(values, device=card.device)


# Where tensors are


def test_numbers_come_to_the_card_and_back(card: FakeCudaDevice) -> None:
    x = torch.arange(6.0, device=card.device).view(2, 3)
    assert (x.device, x.is_cuda) == (card.device, True)
    x[0] += 1
    assert torch.equal((x @ x.T).cpu(), torch.tensor([[14.0, 26.0], [26.0, 50.0]]))
    assert x.sum().item() == 18
    assert torch.equal(torch.nn.Parameter(x, requires_grad=False).cpu(), x.cpu())


def test_tensors_must_be_together(card: FakeCudaDevice) -> None:
    x = on_card(card, [1.0, 2.0])
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(2)
    assert (x * torch.tensor(2.0)).tolist() == [2.0, 4.0]  # a single number may be elsewhere
    assert x[torch.tensor([1])].tolist() == [2.0]  # and indices may
    here = torch.tensor([1], device=card.device)
    mixed: list[Callable[[], object]] = [
        lambda: torch.ones(2)[here], lambda: torch.stack([x[0], torch.tensor(1.0)])
    ]  # fmt: skip
    for odd in mixed:
        with pytest.raises(RuntimeError, match="on the same device"):
            odd()


def test_a_type_that_is_changed_on_the_way_takes_memory_of_its_own(card: FakeCudaDevice) -> None:
    """Where the program does not wait torch changes it on the card."""
    half, place = torch.ones(MIB, dtype=torch.float16), torch.empty(MIB, device=card.device)
    place.copy_(half)
    assert card.allocator.max_allocated == 4 * MIB
    place.copy_(half, non_blocking=True)
    assert card.allocator.max_allocated == 6 * MIB
    assert card.allocator.allocated == 4 * MIB


# Memory


def test_memory_is_handed_out_as_torch_does() -> None:
    allocator, timeline = FakeCachingAllocator(64 * MIB, 4 * MIB, 60 * MIB), StreamTimeline(1)
    small = allocator.allocate(1, timeline, DEFAULT_POOL)
    assert (small.nbytes, allocator.reserved) == (512, 2 * MIB)
    blocks = [allocator.allocate(5 * MIB, timeline, DEFAULT_POOL) for _ in range(3)]
    assert allocator.reserved == 22 * MIB
    large = allocator.allocate(12 * MIB + 1, timeline, DEFAULT_POOL)
    assert (large.segment.nbytes, allocator.reserved) == (14 * MIB, 36 * MIB)
    for block in blocks:
        allocator.free(block)
    assert [block.nbytes for block in blocks[0].segment.blocks] == [20 * MIB]
    assert allocator.allocate(19 * MIB, timeline, DEFAULT_POOL).segment is blocks[0].segment
    with pytest.raises(torch.OutOfMemoryError):
        allocator.allocate(25 * MIB, timeline, DEFAULT_POOL)
    allocator.free(large)
    assert (
        allocator.allocate(25 * MIB, timeline, DEFAULT_POOL).nbytes == 26 * MIB
    )  # for which the free segment went back
    assert (allocator.max_reserved, allocator.allocated) == (48 * MIB, 46 * MIB + 512)


def test_a_stream_is_not_given_what_another_had() -> None:
    allocator = FakeCachingAllocator(64 * MIB, 0, 64 * MIB)
    allocator.free(allocator.allocate(MIB, StreamTimeline(1), DEFAULT_POOL))
    allocator.allocate(MIB, StreamTimeline(2), DEFAULT_POOL)
    assert allocator.reserved == 4 * MIB


def test_memory_is_free_when_the_last_view_is_gone(card: FakeCudaDevice) -> None:
    x = torch.empty(2, 3 * MIB, dtype=torch.uint8, device=card.device)
    row = x[1]
    assert torch.cuda.memory_allocated() == 6 * MIB
    del x
    assert torch.cuda.memory_allocated() == 6 * MIB
    del row
    assert torch.cuda.memory_allocated() == 0


# Streams


def test_two_streams_may_not_meet_unless_one_waits(card: FakeCudaDevice) -> None:
    x, other, done = on_card(card, [1.0]), torch.cuda.Stream(), torch.cuda.Event()  # type: ignore[no-untyped-call]
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x += 1
        done.record()
    with pytest.raises(DataRaceError, match="still written on stream"):
        x * 2
    torch.cuda.current_stream().wait_event(done)
    assert (x * 2).tolist() == [4.0]


def test_memory_may_not_be_handed_on_while_another_stream_is_at_it(card: FakeCudaDevice) -> None:
    x, other = torch.empty(MIB, device=card.device), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(other):
        x.zero_()
    del x
    with pytest.raises(DataRaceError, match="handed on"):
        torch.empty(MIB, device=card.device)


# Graphs


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph.capture_begin(pool=torch.cuda.graph_pool_handle())
        try:
            work()
        finally:
            graph.capture_end()
    return graph


def test_what_is_captured_is_done_when_it_is_replayed(card: FakeCudaDevice) -> None:
    x, said = on_card(card, [1.0, 2.0]), []
    torch.cuda.synchronize()
    graph = capture(lambda: said.append((x + 1).mul_(3)))
    assert said[0].isnan().all()
    graph.replay()
    assert said[0].tolist() == [6.0, 9.0]
    x += 1
    graph.replay()
    assert said[0].tolist() == [9.0, 12.0]


def test_what_cannot_be_captured_ends_the_capture(card: FakeCudaDevice) -> None:
    x, recorded = on_card(card, [1.0]), torch.cuda.Event()  # type: ignore[no-untyped-call]
    recorded.record()
    refused: list[Callable[[], object]] = [
        x.item, lambda: x.copy_(torch.ones(1)), torch.cuda.synchronize, lambda: torch.equal(x, x),
        lambda: torch.cuda.current_stream().wait_event(recorded), lambda: x[torch.tensor([0])], lambda: x[x > 0],
        lambda: x.masked_select(x > 0), lambda: card.lock(4096, 4096),
    ]  # fmt: skip
    for number, work in enumerate(refused):
        with pytest.raises(CaptureError, match="previous error"):
            capture(work)
        assert len(card.allocator.capturing_pools) == number + 1  # torch forgets them, and so must be told


def test_a_stream_that_joins_a_capture_must_come_back(card: FakeCudaDevice) -> None:
    x, other = on_card(card, [1.0]), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def stray() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x + 1

    with pytest.raises(CaptureError, match="unjoined"):
        capture(stray)


def test_a_graph_may_not_outlive_what_it_reads(card: FakeCudaDevice) -> None:
    x = on_card(card, [1.0])
    kept = [x]
    graph = capture(lambda: kept[0] + 1)
    graph.replay()
    del x
    kept.clear()
    with pytest.raises(DataRaceError, match="freed"):
        graph.replay()


def test_a_graph_takes_memory_until_it_is_reset(card: FakeCudaDevice) -> None:
    x = torch.ones(MIB, device=card.device)
    torch.cuda.synchronize()
    graph = capture(lambda: (x + 1) * 2)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 40 * MIB
    assert card.allocator.non_torch_bytes > card_module.CONTEXT_BYTES
    graph.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 20 * MIB
    assert card.allocator.non_torch_bytes == card_module.CONTEXT_BYTES


# The engine on it


@pytest.mark.parametrize(
    ("owner", "name"),
    [(FakeStream, "wait_event"), (FakeEvent, "record"), (FakeStream, "wait_stream")],
    ids=lambda one: str(one),
)
def test_no_wait_of_the_engine_is_for_nothing(
    card: FakeCudaDevice, tiny_model: object, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    from tinysd_batch import TinySD

    model = TinySD.from_pretrained(str(tiny_model), device="cuda", dtype="full", vram_budget="1GB")
    model.offloader.stream_all_weights = True
    model.generate("cat", 1, num_inference_steps=2)
    monkeypatch.setattr(owner, name, lambda *_: None)
    with pytest.raises(DataRaceError):
        model.generate("cat", 1, num_inference_steps=2)
