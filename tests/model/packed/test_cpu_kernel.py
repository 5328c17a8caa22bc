"""unpack.c, compiled for each CPU type, is bit-identical to plain torch."""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinysd_batch.model.packed import cpu_build, cpu_kernel, dequantize
from tinysd_batch.model.packed.fbgemm import dequantize_rows_torch
from tinysd_batch.model.packed.format import (
    GROUP_SIZES,
    SUPPORTED_BITS,
    ZERO_POINT_BITS,
    AffineRowWeight,
    GroupWeight,
    Layout,
    PackedWeight,
)

COMPILER = cpu_build.find_compiler()
NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}, "avx2": {"avx2", "fma"}, "plain": set()}
FLAGS = set(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
DTYPES = st.sampled_from(cpu_kernel.OUTPUT_DTYPES)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here; the program works without the kernel")


@pytest.fixture(scope="module", params=[target for target in cpu_build.list_targets() if NEEDS[target] <= FLAGS])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.c_void_p:
    """The installed library of each CPU type that this CPU supports."""
    assert COMPILER is not None
    path = cpu_build.library_path(request.param)
    if not path.exists():
        path = tmp_path_factory.mktemp("compiled") / f"{request.param}.so"
        cpu_build.compile_library(request.param, COMPILER, path)
    return ctypes.cast(ctypes.CDLL(str(path)).unpack, ctypes.c_void_p)


def random_bytes(*shape: int, seed: int, high: int = 256) -> torch.Tensor:
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def finite_halves(*shape: int, seed: int) -> torch.Tensor:
    """Return bits of random finite float16 numbers, including negative and subnormal ones."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    return torch.where(bits.view(torch.float16).isfinite(), bits, torch.zeros_like(bits))


def dequantize_with(target: ctypes.c_void_p, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize with the kernel, and check that it does not write outside its output."""
    rows, columns = weight.shape
    padded = torch.full((2 * 64 + rows * columns * dtype.itemsize,), 0xA5, dtype=torch.uint8)
    cpu_kernel.run_cpu_kernel(weight, padded[64:-64].view(dtype).view(rows, columns), target)
    assert (padded[:64] == 0xA5).all()
    assert (padded[-64:] == 0xA5).all()
    return padded[64:-64]


def expected_bytes(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    return dequantize.dequantize(weight, out, dequantize_rows_torch).view(-1).view(torch.uint8)


def is_identical(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether results are bit-identical, except that zero may have either sign and NaN any bits."""
    return torch.equal(result.view(dtype).nan_to_num(nan=7), expected.view(dtype).nan_to_num(nan=7))


@needs_compiler
@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from(GROUP_SIZES), st.sampled_from(SUPPORTED_BITS), DTYPES,
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_groups(
    target: ctypes.c_void_p, rows: int, groups: int, size: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    weight = GroupWeight(
        random_bytes(rows, groups * size * bits // 8, seed=seed), random_bytes(rows, groups, seed=seed + 1),
        random_bytes(rows, groups, seed=seed + 2), finite_halves(rows, 4, seed=seed), bits=bits,
    )  # fmt: skip
    assert is_identical(dequantize_with(target, weight, dtype), expected_bytes(weight, dtype), dtype)


@needs_compiler
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from(SUPPORTED_BITS), DTYPES, st.integers(0, 2**32 - 1))
def test_whole_rows(target: ctypes.c_void_p, rows: int, quads: int, bits: int, dtype: torch.dtype, seed: int) -> None:
    weight = AffineRowWeight(
        random_bytes(rows, quads * bits // 2, seed=seed), finite_halves(rows, 2, seed=seed), bits=bits
    )
    assert is_identical(dequantize_with(target, weight, dtype), expected_bytes(weight, dtype), dtype)


@needs_compiler
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from(ZERO_POINT_BITS), DTYPES, st.integers(0, 2**32 - 1))
def test_rows_with_a_zero_point(
    target: ctypes.c_void_p, rows: int, quads: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    delta = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).abs().exp()
    weight = Layout(bits, None).weight({
        "qweight": random_bytes(rows, quads * bits // 2, seed=seed),
        "qzero": random_bytes(rows, seed=seed, high=2**bits),
        "qdelta": delta.view(torch.int32),
    })  # fmt: skip
    assert is_identical(dequantize_with(target, weight, dtype), expected_bytes(weight, dtype), dtype)


@needs_compiler
def test_all_bytes_of_scales_and_offsets(target: ctypes.c_void_p) -> None:
    """All bytes, with random minimums and steps."""
    count = 64
    weight = GroupWeight(
        random_bytes(count, 256 * 4, seed=1), torch.arange(256, dtype=torch.uint8).repeat(count, 1),
        torch.arange(256, dtype=torch.uint8).flip(0).repeat(count, 1), finite_halves(count, 4, seed=3), bits=2,
    )  # fmt: skip
    assert is_identical(
        dequantize_with(target, weight, torch.float32), expected_bytes(weight, torch.float32), torch.float32
    )


@needs_compiler
def test_number_of_threads_does_not_change_the_result(target: ctypes.c_void_p, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernel, "MIN_PARALLEL_WEIGHTS", 0)
    monkeypatch.setattr(cpu_kernel, "WEIGHTS_PER_TASK", 100)
    weight = AffineRowWeight(random_bytes(301, 24, seed=1), finite_halves(301, 2, seed=2))
    expected = expected_bytes(weight, torch.bfloat16)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(dequantize_with(target, weight, torch.bfloat16), expected)


@needs_compiler
def test_openmp_library_of_torch_is_found() -> None:
    """All builds of torch for Linux use OpenMP."""
    assert "OpenMP" in torch.__config__.parallel_info()
    assert cpu_kernel.find_openmp_library() is not None


@needs_compiler
def test_several_threads_may_dequantize_at_the_same_time(
    target: ctypes.c_void_p, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weights = [AffineRowWeight(random_bytes(900, 80, seed=n), finite_halves(900, 2, seed=n)) for n in range(4)]
    differing: list[int] = []

    def work(number: int) -> None:
        expected = expected_bytes(weights[number], torch.float32)
        results = (dequantize_with(target, weights[number], torch.float32) for _ in range(20))
        differing.extend(number for result in results if not torch.equal(result, expected))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


@pytest.fixture
def cleared_caches() -> Iterator[None]:
    """Clear what is cached about this CPU, before and after the test."""
    cpu_kernel.get_cpu_kernel.cache_clear()
    dequantize.has_working_kernels.cache_clear()
    yield
    cpu_kernel.get_cpu_kernel.cache_clear()
    dequantize.has_working_kernels.cache_clear()


@pytest.mark.usefixtures("cleared_caches")
def test_torch_dequantizes_the_same_without_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_build, "library_path", lambda _: tmp_path / "missing.so")
    weight = AffineRowWeight(random_bytes(5, 24, seed=1), finite_halves(5, 2, seed=2))
    assert not dequantize.has_working_kernels(torch.device("cpu"))
    result = dequantize.dequantize(weight, torch.empty(weight.shape))
    assert torch.equal(result.view(-1).view(torch.uint8), expected_bytes(weight, torch.float32))


@needs_compiler
@pytest.mark.usefixtures("cleared_caches")
def test_library_with_wrong_results_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert COMPILER is not None
    (tmp_path / "unpack.c").write_text("void unpack(void *work) { (void)work; }")
    monkeypatch.setattr(cpu_build, "SOURCE", tmp_path / "unpack.c")
    cpu_build.compile_library("plain", COMPILER, tmp_path / "idle.so")
    monkeypatch.setattr(cpu_build, "library_path", lambda _: tmp_path / "idle.so")
    assert not dequantize.has_working_kernels(torch.device("cpu"))


@needs_compiler
@pytest.mark.usefixtures("cleared_caches")
def test_installed_library_is_used() -> None:
    """Also if it is first tested while memory is estimated, on the meta device."""
    with torch.device("meta"):
        assert dequantize.has_working_kernels(torch.device("cpu"))


def test_library_is_not_used_after_its_source_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = cpu_build.library_path("plain")
    (tmp_path / "unpack.c").write_text(cpu_build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(cpu_build, "SOURCE", tmp_path / "unpack.c")
    assert cpu_build.library_path("plain").name != before.name


@pytest.mark.parametrize(
    ("capability", "target"),
    [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "plain"), ("SVE256", "plain"), ("NO AVX", "plain")],
)
def test_target_is_chosen_by_torchs_cpu_capability(capability: str, target: str) -> None:
    assert cpu_build.choose_target(capability) == target
