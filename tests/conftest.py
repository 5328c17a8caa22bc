"""Fixtures: tiny models with SD's classes and random weights, a folder to work in, and CUDA devices.

The CUDA device is a fake one, or with `pytest -m gpu` a real one.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hypothesis
import pytest

from tests.support.session import DEFAULT_EXAMPLES, made_once
from tests.support.tiny_models import write_float_model

# Heavy libraries are imported in fixtures: the process that distributes tests to its workers does not need them.
if TYPE_CHECKING:
    from tests.support.fake_cuda.device import FakeCudaDevice
    from tests.support.fake_cuda.shape_only import ShapeOnlyCudaDevice

AnyFakeGpu = TypeVar("AnyFakeGpu", bound="FakeCudaDevice")

# No deadlines and no check for slow generation, because machines may be busy. Every run tries the same examples, ten
# times as many with HYPOTHESIS_PROFILE=thorough.
hypothesis.settings.register_profile(
    "patient", max_examples=DEFAULT_EXAMPLES, derandomize=True, deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("patient"), max_examples=10 * DEFAULT_EXAMPLES
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which would take half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model folder: 16x16 pixels, blocks named as in SD v1, random weights."""
    return made_once(tmp_path_factory, "models/float", write_float_model)


@pytest.fixture(scope="session")
def tiny_model(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model, packed to 2, 4 and 8 bits."""
    from tinysd_batch.quantize.data_free import quantize_folder

    return made_once(tmp_path_factory, "models/packed", lambda out: quantize_folder(float_model, out, "quality"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty except for a valid manifest."""
    (tmp_path / "m.csv").write_text("prompt\ncat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake_gpu() -> "Iterator[FakeCudaDevice]":
    """A fake CUDA device with 4 GiB; fails the test if its rules were violated."""
    from tests.support.fake_cuda.device import FakeCudaDevice

    with checked_fake_gpu(FakeCudaDevice()) as gpu:
        yield gpu


@pytest.fixture
def shape_only_gpu() -> "Iterator[ShapeOnlyCudaDevice]":
    """The same, but it computes shapes only."""
    from tests.support.fake_cuda.shape_only import ShapeOnlyCudaDevice

    with checked_fake_gpu(ShapeOnlyCudaDevice()) as gpu:
        yield gpu


@contextmanager
def checked_fake_gpu(gpu: AnyFakeGpu) -> Iterator[AnyFakeGpu]:
    import torch

    from tests.support.fake_cuda.driver import COMPILER
    from tests.support.fake_cuda.patch import use_fake_cuda
    from tests.support.fake_cuda.race_detector import DataRaceError

    if COMPILER is None:
        pytest.skip("no g++ to compile the kernels with")
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with use_fake_cuda(gpu):
        yield gpu
    assert not DataRaceError.raised
    assert not gpu.allocator.capturing_pools, "a graph capture was not ended"


@pytest.fixture
def real_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["fake_gpu", pytest.param("real_gpu", marks=pytest.mark.gpu)])
def cuda_device(request: pytest.FixtureRequest) -> "FakeCudaDevice | None":
    """The fake CUDA device, or None for a real GPU: what holds for both is tested on both."""
    device: FakeCudaDevice | None = request.getfixturevalue(request.param)
    return device
