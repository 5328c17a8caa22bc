"""The fake CUDA device reports violations of CUDA's rules. If it accepted them, tests on it would prove nothing."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support.fake_cuda.allocator import DEFAULT_POOL, FakeCachingAllocator
from tests.support.fake_cuda.device import CONTEXT_BYTES, FakeCudaDevice, FakeEvent, FakeStream
from tests.support.fake_cuda.graphs import CaptureError
from tests.support.fake_cuda.patch import use_fake_cuda
from tests.support.fake_cuda.race_detector import DataRaceError, StreamTimeline

MIB = 2**20


@pytest.fixture
def gpu() -> Iterator[FakeCudaDevice]:
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with use_fake_cuda(FakeCudaDevice()) as device:
        yield device


def on_gpu(gpu: FakeCudaDevice, values: list[float]) -> Tensor:
    return torch.tensor(values, device=gpu.device)


# Devices of tensors


def test_data_is_copied_to_the_gpu_and_back(gpu: FakeCudaDevice) -> None:
    x = torch.arange(6.0, device=gpu.device).view(2, 3)
    assert (x.device, x.is_cuda) == (gpu.device, True)
    x[0] += 1
    assert torch.equal((x @ x.T).cpu(), torch.tensor([[14.0, 26.0], [26.0, 50.0]]))
    assert x.sum().item() == 18
    assert torch.equal(torch.nn.Parameter(x, requires_grad=False).cpu(), x.cpu())


def test_tensors_must_be_on_the_same_device(gpu: FakeCudaDevice) -> None:
    x = on_gpu(gpu, [1.0, 2.0])
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(2)
    assert (x * torch.tensor(2.0)).tolist() == [2.0, 4.0]  # scalars may be on the host
    assert x[torch.tensor([1])].tolist() == [2.0]  # and so may indices
    index = torch.tensor([1], device=gpu.device)
    operations: list[Callable[[], object]] = [
        lambda: torch.ones(2)[index],
        lambda: torch.stack([x[0], torch.tensor(1.0)]),
    ]
    for operation in operations:
        with pytest.raises(RuntimeError, match="on the same device"):
            operation()


def test_asynchronous_copy_with_dtype_conversion_allocates_memory(gpu: FakeCudaDevice) -> None:
    """Torch converts the dtype on the GPU if the program does not wait for the copy."""
    half, target = torch.ones(MIB, dtype=torch.float16), torch.empty(MIB, device=gpu.device)
    target.copy_(half)
    assert gpu.allocator.max_allocated == 4 * MIB
    target.copy_(half, non_blocking=True)
    assert gpu.allocator.max_allocated == 6 * MIB
    assert gpu.allocator.allocated == 4 * MIB


# Memory


def test_memory_is_allocated_as_torch_does() -> None:
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
    )  # the free segment was released first
    assert (allocator.max_reserved, allocator.allocated) == (48 * MIB, 46 * MIB + 512)


def test_streams_do_not_share_free_blocks() -> None:
    allocator = FakeCachingAllocator(64 * MIB, 0, 64 * MIB)
    allocator.free(allocator.allocate(MIB, StreamTimeline(1), DEFAULT_POOL))
    allocator.allocate(MIB, StreamTimeline(2), DEFAULT_POOL)
    assert allocator.reserved == 4 * MIB


def test_memory_is_freed_with_the_last_view(gpu: FakeCudaDevice) -> None:
    x = torch.empty(2, 3 * MIB, dtype=torch.uint8, device=gpu.device)
    row = x[1]
    assert torch.cuda.memory_allocated() == 6 * MIB
    del x
    assert torch.cuda.memory_allocated() == 6 * MIB
    del row
    assert torch.cuda.memory_allocated() == 0


# Streams


def test_streams_must_wait_before_they_access_the_same_memory(gpu: FakeCudaDevice) -> None:
    x, other, done = on_gpu(gpu, [1.0]), torch.cuda.Stream(), torch.cuda.Event()  # type: ignore[no-untyped-call]
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x += 1
        done.record()
    with pytest.raises(DataRaceError, match="still written on stream"):
        x * 2
    torch.cuda.current_stream().wait_event(done)
    assert (x * 2).tolist() == [4.0]


def test_memory_in_use_by_another_stream_must_not_be_reused(gpu: FakeCudaDevice) -> None:
    x, other = torch.empty(MIB, device=gpu.device), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(other):
        x.zero_()
    del x
    with pytest.raises(DataRaceError, match="allocated again"):
        torch.empty(MIB, device=gpu.device)


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


def test_captured_operations_run_when_the_graph_is_replayed(gpu: FakeCudaDevice) -> None:
    x, outputs = on_gpu(gpu, [1.0, 2.0]), []
    torch.cuda.synchronize()
    graph = capture(lambda: outputs.append((x + 1).mul_(3)))
    assert outputs[0].isnan().all()
    graph.replay()
    assert outputs[0].tolist() == [6.0, 9.0]
    x += 1
    graph.replay()
    assert outputs[0].tolist() == [9.0, 12.0]


def test_operations_that_cannot_be_captured_abort_the_capture(gpu: FakeCudaDevice) -> None:
    x, event = on_gpu(gpu, [1.0]), torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    operations: list[Callable[[], object]] = [
        x.item, lambda: x.copy_(torch.ones(1)), torch.cuda.synchronize, lambda: torch.equal(x, x),
        lambda: torch.cuda.current_stream().wait_event(event), lambda: x[torch.tensor([0])], lambda: x[x > 0],
        lambda: x.masked_select(x > 0), lambda: gpu.lock(4096, 4096),
    ]  # fmt: skip
    for number, operation in enumerate(operations):
        with pytest.raises(CaptureError, match="previous error"):
            capture(operation)
        assert len(gpu.allocator.capturing_pools) == number + 1  # torch does not end them itself


def test_stream_that_joins_a_capture_must_be_joined_again(gpu: FakeCudaDevice) -> None:
    x, other = on_gpu(gpu, [1.0]), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def use_other_stream() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x + 1

    with pytest.raises(CaptureError, match="unjoined"):
        capture(use_other_stream)


def test_graph_must_not_outlive_its_inputs(gpu: FakeCudaDevice) -> None:
    x = on_gpu(gpu, [1.0])
    kept = [x]
    graph = capture(lambda: kept[0] + 1)
    graph.replay()
    del x
    kept.clear()
    with pytest.raises(DataRaceError, match="freed"):
        graph.replay()


def test_graph_takes_memory_until_it_is_reset(gpu: FakeCudaDevice) -> None:
    x = torch.ones(MIB, device=gpu.device)
    torch.cuda.synchronize()
    graph = capture(lambda: (x + 1) * 2)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 40 * MIB
    assert gpu.allocator.non_torch_bytes > CONTEXT_BYTES
    graph.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 20 * MIB
    assert gpu.allocator.non_torch_bytes == CONTEXT_BYTES


# The engine on the fake device


@pytest.mark.parametrize(
    ("owner", "name"),
    [(FakeStream, "wait_event"), (FakeEvent, "record"), (FakeStream, "wait_stream")],
    ids=["wait_event", "record", "wait_stream"],
)
def test_every_wait_of_the_engine_is_necessary(
    gpu: FakeCudaDevice, tiny_model: object, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    from tinysd_batch import TinySD

    model = TinySD.from_pretrained(str(tiny_model), device="cuda", dtype="full", vram_budget="1GB")
    model.offloader.stream_all_weights = True
    model.generate("cat", 1, num_inference_steps=2)
    monkeypatch.setattr(owner, name, lambda *_: None)
    with pytest.raises(DataRaceError):
        model.generate("cat", 1, num_inference_steps=2)
