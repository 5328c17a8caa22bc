"""unpack.c as it was compiled for each sort of processor, held to the bit against plain torch."""

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

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here: then the program does without, too")


@pytest.fixture(scope="module", params=[target for target in cpu_build.list_targets() if NEEDS[target] <= FLAGS])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.c_void_p:
    """Every sort of processor that this one can stand for: what was compiled for it when this was installed."""
    assert COMPILER is not None
    path = cpu_build.library_path(request.param)
    if not path.exists():
        path = tmp_path_factory.mktemp("compiled") / f"{request.param}.so"
        cpu_build.compile_library(request.param, COMPILER, path)
    return ctypes.cast(ctypes.CDLL(str(path)).unpack, ctypes.c_void_p)


def random_bytes(*shape: int, seed: int, most: int = 256) -> torch.Tensor:
    return torch.randint(0, most, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def finite_halves(*shape: int, seed: int) -> torch.Tensor:
    """float16 bits of every kind of finite number, signs and subnormals among them."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    return torch.where(bits.view(torch.float16).isfinite(), bits, torch.zeros_like(bits))


def unpacked(target: ctypes.c_void_p, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """By the kernel, between bytes that it must leave alone."""
    rows, columns = weight.shape
    around = torch.full((2 * 64 + rows * columns * dtype.itemsize,), 0xA5, dtype=torch.uint8)
    cpu_kernel.run_cpu_kernel(weight, around[64:-64].view(dtype).view(rows, columns), target)
    assert (around[:64] == 0xA5).all()
    assert (around[-64:] == 0xA5).all()
    return around[64:-64]


def expected(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    return dequantize.dequantize(weight, out, dequantize_rows_torch).view(-1).view(torch.uint8)


def agree(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """To the bit; but zero may have either sign, and what is no number any bits."""
    return torch.equal(found.view(dtype).nan_to_num(nan=7), wanted.view(dtype).nan_to_num(nan=7))


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
    assert agree(unpacked(target, weight, dtype), expected(weight, dtype), dtype)


@needs_compiler
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from(SUPPORTED_BITS), DTYPES, st.integers(0, 2**32 - 1))
def test_whole_rows(target: ctypes.c_void_p, rows: int, quads: int, bits: int, dtype: torch.dtype, seed: int) -> None:
    weight = AffineRowWeight(
        random_bytes(rows, quads * bits // 2, seed=seed), finite_halves(rows, 2, seed=seed), bits=bits
    )
    assert agree(unpacked(target, weight, dtype), expected(weight, dtype), dtype)


@needs_compiler
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from(ZERO_POINT_BITS), DTYPES, st.integers(0, 2**32 - 1))
def test_rows_of_the_origin(
    target: ctypes.c_void_p, rows: int, quads: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    delta = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).abs().exp()
    weight = Layout(bits, None).weight({
        "qweight": random_bytes(rows, quads * bits // 2, seed=seed),
        "qzero": random_bytes(rows, seed=seed, most=2**bits),
        "qdelta": delta.view(torch.int32),
    })  # fmt: skip
    assert agree(unpacked(target, weight, dtype), expected(weight, dtype), dtype)


@needs_compiler
def test_a_byte_stands_for_the_same_number_whatever_its_row_says(target: ctypes.c_void_p) -> None:
    """All bytes, with ends and steps of every kind."""
    count = 64
    weight = GroupWeight(
        random_bytes(count, 256 * 4, seed=1), torch.arange(256, dtype=torch.uint8).repeat(count, 1),
        torch.arange(256, dtype=torch.uint8).flip(0).repeat(count, 1), finite_halves(count, 4, seed=3), bits=2,
    )  # fmt: skip
    assert agree(unpacked(target, weight, torch.float32), expected(weight, torch.float32), torch.float32)


@needs_compiler
def test_any_number_of_threads_unpacks_the_same(target: ctypes.c_void_p, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernel, "MIN_PARALLEL_WEIGHTS", 0)
    monkeypatch.setattr(cpu_kernel, "WEIGHTS_PER_TASK", 100)
    weight = AffineRowWeight(random_bytes(301, 24, seed=1), finite_halves(301, 2, seed=2))
    wanted = expected(weight, torch.bfloat16)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(unpacked(target, weight, torch.bfloat16), wanted)


@needs_compiler
def test_torchs_own_threads_are_found() -> None:
    """Where it works with OpenMP, as all builds for Linux do."""
    assert "OpenMP" in torch.__config__.parallel_info()
    assert cpu_kernel.find_openmp_library() is not None


@needs_compiler
def test_several_may_unpack_at_once(target: ctypes.c_void_p, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weights = [AffineRowWeight(random_bytes(900, 80, seed=n), finite_halves(900, 2, seed=n)) for n in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        wanted = expected(weights[number], torch.float32)
        wrong.extend(1 for _ in range(20) if not torch.equal(unpacked(target, weights[number], torch.float32), wanted))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def not_asked_yet() -> Iterator[None]:
    """Nothing is known of this processor, and what is found out is forgotten."""
    cpu_kernel.get_cpu_kernel.cache_clear()
    dequantize.has_working_kernels.cache_clear()
    yield
    cpu_kernel.get_cpu_kernel.cache_clear()
    dequantize.has_working_kernels.cache_clear()


@pytest.mark.usefixtures("not_asked_yet")
def test_without_a_library_torch_unpacks_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_build, "library_path", lambda _: tmp_path / "missing.so")
    weight = AffineRowWeight(random_bytes(5, 24, seed=1), finite_halves(5, 2, seed=2))
    assert not dequantize.has_working_kernels(torch.device("cpu"))
    found = dequantize.dequantize(weight, torch.empty(weight.shape))
    assert torch.equal(found.view(-1).view(torch.uint8), expected(weight, torch.float32))


@needs_compiler
@pytest.mark.usefixtures("not_asked_yet")
def test_a_library_that_unpacks_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert COMPILER is not None
    (tmp_path / "unpack.c").write_text("void unpack(void *work) { (void)work; }")
    monkeypatch.setattr(cpu_build, "SOURCE", tmp_path / "unpack.c")
    cpu_build.compile_library("plain", COMPILER, tmp_path / "idle.so")
    monkeypatch.setattr(cpu_build, "library_path", lambda _: tmp_path / "idle.so")
    assert not dequantize.has_working_kernels(torch.device("cpu"))


@needs_compiler
@pytest.mark.usefixtures("not_asked_yet")
def test_what_was_compiled_when_this_was_installed_is_used() -> None:
    """Also where the question comes up first while memory is foretold, on the meta device."""
    with torch.device("meta"):
        assert dequantize.has_working_kernels(torch.device("cpu"))


def test_a_library_does_not_outlive_its_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = cpu_build.library_path("plain")
    (tmp_path / "unpack.c").write_text(cpu_build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(cpu_build, "SOURCE", tmp_path / "unpack.c")
    assert cpu_build.library_path("plain").name != before.name


@pytest.mark.parametrize(
    ("capability", "target"),
    [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "plain"), ("SVE256", "plain"), ("NO AVX", "plain")],
)
def test_the_target_is_what_torch_says_of_the_processor(capability: str, target: str) -> None:
    assert cpu_build.choose_target(capability) == target
