"""Formats of packed weights, and layers that dequantize them when they are used."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support.session import examples
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.chunking import DEFAULT_CHUNK_BYTES, limit_chunk_bytes
from tinysd_batch.model.offload.peak_memory import PeakMemoryTracker
from tinysd_batch.model.packed import dequantize, fbgemm, layers
from tinysd_batch.model.packed import format as packed_format
from tinysd_batch.model.packed.fbgemm import dequantize_by_rows
from tinysd_batch.model.packed.format import WHOLE_ROW, AffineRowWeight, Layout, PackedWeight, ZeroPointRowWeight
from tinysd_batch.model.packed.layers import (
    PackedConv2d,
    PackedLayer,
    keep_dequantized,
    make_packed_layer,
    required_scratch_bytes,
)
from tinysd_batch.quantize.solve.affine import quantize_matrix

BITS = st.sampled_from(packed_format.SUPPORTED_BITS)
LAYOUTS = [
    Layout(2, 64), Layout(2, 16), Layout(4, 32), Layout(8, 64), Layout(2, 128), Layout(2, 256), Layout(2, WHOLE_ROW),
    Layout(8, WHOLE_ROW), Layout(2, None), Layout(8, None),
]  # fmt: skip
COLUMNS = 768  # a multiple of all group sizes
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from(packed_format.GROUP_SIZES))


@given(st.integers(1, 7), st.integers(1, 40), BITS, st.integers(0, 2**32 - 1))
def test_packed_codes_are_unpacked_unchanged(rows: int, quads: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, quads * 4), dtype=torch.uint8, generator=generator)
    packed = packed_format.pack_codes(codes, bits)
    assert packed.shape == (rows, quads * bits // 2)
    assert torch.equal(packed_format.unpack_codes(packed, bits), codes)


def test_first_code_is_in_the_lowest_bits() -> None:
    assert packed_format.pack_codes(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00_11_10_01]]
    assert packed_format.pack_codes(torch.tensor([[1, 10]], dtype=torch.uint8), 4).tolist() == [[0b1010_0001]]


def random_rows(count: int, group: int, bits: int, seed: int) -> torch.Tensor:
    """Return FBGEMM rows with random finite scales and offsets, including negative and subnormal ones."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count, group * bits // 8), dtype=torch.uint8, generator=generator)
    numbers = torch.randint(-(2**15), 2**15, (count, 2), generator=generator).to(torch.int16).view(torch.float16)
    finite = torch.where(numbers.isfinite(), numbers, torch.zeros_like(numbers))
    return fbgemm.to_fbgemm_rows(codes, finite, bits)


@pytest.mark.skipif(
    not fbgemm.has_fbgemm(), reason="this torch has no FBGEMM operator, so the program uses plain torch"
)
@given(st.integers(1, 5000), st.sampled_from(packed_format.GROUP_SIZES), BITS, st.integers(0, 2**32 - 1))
def test_fbgemm_is_bit_identical_to_plain_torch(count: int, group: int, bits: int, seed: int) -> None:
    rows = random_rows(count, group, bits, seed)
    assert torch.equal(fbgemm.dequantize_rows_fbgemm(rows, bits), fbgemm.dequantize_rows_torch(rows, bits))


@given(SHAPES, BITS, st.integers(0, 2**32 - 1))
def test_groups_hold_code_times_scale_plus_offset(shape: tuple[int, int, int], bits: int, seed: int) -> None:
    out, groups, size = shape
    matrix = torch.randn(out, groups * size, generator=torch.Generator().manual_seed(seed))
    weight = quantize_matrix(matrix, size, bits)
    assert weight.layout == Layout(bits, size)
    scale, offset = packed_format.get_scales_and_offsets(weight)
    codes = packed_format.unpack_codes(weight.qweight, bits).view(out, groups, size).float()
    expected = codes * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
    assert torch.equal(dense(weight).view(out, groups, size), expected)


@given(st.integers(1, 9), st.integers(1, 40), BITS, st.integers(0, 2**32 - 1))
def test_whole_row_is_the_same_as_one_group(rows: int, quads: int, bits: int, seed: int) -> None:
    matrix = torch.randn(rows, 4 * quads, generator=torch.Generator().manual_seed(seed))
    group = quantize_matrix(matrix, 4 * quads, bits)
    row = group.convert_to(Layout(bits, WHOLE_ROW))
    assert isinstance(row, AffineRowWeight)
    assert set(row.tensors()) == {"qweight", "qaffine"}
    assert torch.equal(dense(row), dense(group))


def random_row_weight(rows: int, columns: int, bits: int, seed: int) -> ZeroPointRowWeight:
    """Return a weight as a checkpoint of tiny-stable-diffusion may hold it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (rows,), generator=generator).to(torch.uint8)
    delta = torch.randn(rows, generator=generator).abs() * 10 ** torch.randn(rows, generator=generator)
    return ZeroPointRowWeight(codes, zero, delta.view(torch.int32), bits=bits)


def random_weight(layout: Layout, rows: int) -> PackedWeight:
    """Return a weight of COLUMNS columns in any layout."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype)
        for name, (dtype, shape) in layout.tensors(rows, COLUMNS).items()
    }
    if layout.group_size is None:
        tensors["qdelta"] = torch.rand(rows, generator=generator).view(torch.int32)
    return layout.weight(tensors)


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([2, 8]), st.integers(0, 2**32 - 1))
def test_zero_point_rows_are_code_minus_zero_times_delta(rows: int, quads: int, bits: int, seed: int) -> None:
    weight = random_row_weight(rows, 4 * quads, bits, seed)
    codes = packed_format.unpack_codes(weight.qweight, bits)
    expected = (codes.float() - weight.qzero.float()[:, None]) * weight.qdelta.view(torch.float32)[:, None]
    assert torch.equal(dense(weight), expected)


@examples(10)
@given(st.integers(1, 400), st.sampled_from([64, 640, 5760]), st.integers(0, 2**32 - 1))
def test_all_ways_to_dequantize_are_bit_identical(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weights: list[PackedWeight] = [quantize_matrix(matrix, 64, bits) for bits in packed_format.SUPPORTED_BITS]
    whole_rows = [
        quantize_matrix(matrix, columns, bits).convert_to(Layout(bits, WHOLE_ROW))
        for bits in packed_format.SUPPORTED_BITS
    ]
    for weight in (*weights, *whole_rows, random_row_weight(rows, columns, 2, seed)):
        by_torch = dequantize.dequantize(weight, torch.empty(rows, columns), fbgemm.dequantize_rows_torch)
        assert torch.equal(dense(weight), by_torch)
        assert torch.equal(dequantize_by_rows(weight, torch.empty(rows, columns)), by_torch)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy at an odd address, as in a file where tensors follow each other."""
    memory = torch.empty(tensor.numel() + 1, dtype=torch.uint8)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("lines", [1, 5, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_steps_and_addresses_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, lines: int
) -> None:
    weight = random_weight(layout, 11)
    expected = dequantize.dequantize(weight, torch.empty(weight.shape), fbgemm.dequantize_rows_torch)
    monkeypatch.setattr(fbgemm, "WEIGHTS_PER_STEP", lines * (layout.group_size or COLUMNS))
    for function in (dequantize.dequantize, dequantize_by_rows):
        for changed in (weight, replace(weight, qweight=shifted(weight.qweight))):
            assert torch.equal(function(changed, torch.empty(weight.shape)), expected)
        assert torch.equal(function(weight.select_rows(slice(3, 9)), torch.empty(6, COLUMNS)), expected[3:9])


def test_memory_for_dequantizing_is_measured_on_the_meta_device() -> None:
    """At least the rows and floats of one step, and less than twice as much."""
    weight = random_weight(Layout(2, 64), 1).map_tensors(lambda tensor: tensor.to("meta").expand(2048, -1).contiguous())
    out = torch.empty(weight.shape, device="meta")
    with torch.device("meta"), PeakMemoryTracker() as tracker:
        tracker.exclude([*weight.tensors().values(), out])
        dequantize_by_rows(weight, out)
    assert 4 * fbgemm.WEIGHTS_PER_STEP <= tracker.peak_bytes < 8 * fbgemm.WEIGHTS_PER_STEP


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_is_the_same_after_config_round_trip(layout: Layout) -> None:
    assert Layout.from_config_entry(layout.to_config_entry((8, 64))) == layout


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weight_takes_the_bytes_of_its_layout(layout: Layout) -> None:
    weight = layout.weight(
        {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.tensors(6, COLUMNS).items()}
    )
    assert weight.shape == (6, COLUMNS)
    assert weight.layout == layout
    assert sum(tensor.nbytes for tensor in weight.tensors().values()) == layout.nbytes(6, COLUMNS)


@pytest.mark.parametrize(
    "entry",
    [
        {}, {"bits": 2}, {"bits": 3, "group_size": 64}, {"bits": 2, "group_size": 7}, {"bits": 2, "group_size": 0},
        {"bits": 2, "group_size": -64}, {"bits": "2", "group_size": 64},
        {"bits": 2.0, "group_size": 64}, {"bits": 2, "group_size": 64.0}, {"bits": [2], "group_size": 64},
        {"bits": 2, "group_size": 2**40}, {"bits": 4, "kind": "row"}, {"bits": 0, "kind": "row"},
        {"bits": 3, "kind": "affine_row"}, {"bits": 2, "kind": ["row"]},
    ],
)  # fmt: skip
def test_invalid_layouts_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"expected a layer at 2, 4 or 8 bits in groups of 16, 32, 64, 128 or 256"):
        Layout.from_config_entry(entry)


def test_layout_stores_no_incomplete_group() -> None:
    with pytest.raises(ModelError, match="a row of 96 weights cannot be stored in 4 bits in groups of 64"):
        Layout(4, 64).tensors(8, 96)


@pytest.mark.parametrize(("bits", "min_db"), [(2, 8.5), (4, 21), (8, 44)])
def test_more_bits_have_smaller_errors(bits: int, min_db: float) -> None:
    matrix = torch.randn(64, 640, generator=torch.Generator().manual_seed(1))
    error = (dense(quantize_matrix(matrix, 64, bits)) - matrix).square().mean()
    assert float(-10 * error.log10()) > min_db


def fill(layer: PackedLayer, weight: PackedWeight, bias: torch.Tensor | None) -> None:
    for name, tensor in weight.tensors().items():
        setattr(layer, name, tensor)
    if bias is not None:
        layer.bias = nn.Parameter(bias)


def dequantized(layer: PackedLayer) -> torch.Tensor:
    """Return the layer's weight as one matrix."""
    ((whole, _),) = layer.dequantized_chunks(torch.float32)
    return whole


def dense(weight: PackedWeight) -> torch.Tensor:
    return dequantize.dequantize(weight, torch.empty(weight.shape))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_a_linear_layer_with_the_dequantized_weight(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(96, 20, bias=bias)
    weight = quantize_matrix(linear.weight.detach(), 32)
    layer = make_packed_layer(linear, weight.layout)
    fill(layer, weight, linear.bias.detach() if bias else None)
    x = torch.randn(3, 5, 96)
    assert torch.equal(layer(x), F.linear(x, dense(weight), linear.bias))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_packed_convolution_is_a_convolution_with_the_dequantized_weight(
    kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(64, 24, kernel, stride, padding)
    weight = quantize_matrix(packed_format.to_matrix(conv.weight.detach()), 64)
    layer = make_packed_layer(conv, weight.layout)
    fill(layer, weight, conv.bias.detach() if conv.bias is not None else None)
    x = torch.randn(2, 64, 9, 7)
    kernels = dense(weight).view(24, kernel, kernel, 64).permute(0, 3, 1, 2)
    expected = F.conv2d(x, kernels.contiguous(), conv.bias, stride, padding)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_layers_share_a_buffer_unless_they_keep_their_weight() -> None:
    torch.manual_seed(3)
    first, second = (make_packed_layer(nn.Linear(64, 8), Layout(2, 64)) for _ in range(2))
    for layer in (first, second):
        fill(layer, quantize_matrix(torch.randn(8, 64), 64), None)
    assert dequantized(first).data_ptr() == dequantized(second).data_ptr()
    keep_dequantized(first)
    kept = dequantized(first)
    before = kept.clone()
    dequantized(second)
    assert dequantized(first).data_ptr() == kept.data_ptr()
    assert torch.equal(kept, before)
    fill(first, quantize_matrix(torch.randn(8, 64), 64), None)
    assert not torch.equal(dequantized(first), before)


def test_reserved_scratch_memory_is_what_layers_use(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize.SCRATCH, "buffers", {})
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    dequantize.SCRATCH.release(torch.device("cpu"))
    with torch.no_grad(), model.offloader.holding(model.encode_fragment, model.decode_fragment):
        model.predict_noise(torch.randn(1, 4, 8, 8), torch.tensor(500.0), torch.randn(1, 22, 32))
    used = dequantize.SCRATCH.buffers[torch.device("cpu")].numel()
    assert used == required_scratch_bytes(model.unet, model.dtype) > 0


def test_buffer_from_inference_mode_can_be_used_outside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize.SCRATCH, "buffers", {})
    layer = make_packed_layer(nn.Linear(64, 8), Layout(2, 64))
    fill(layer, quantize_matrix(torch.randn(8, 64), 64), None)
    with torch.inference_mode():
        first = dequantized(layer).clone()
    assert torch.equal(dequantized(layer), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrix_larger_than_the_limit_is_used_in_chunks(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    linear, conv = nn.Linear(64, 50), nn.Conv2d(64, 50, 3, padding=1)
    maps = torch.randn(2, 64, 5, 5).to(dtype)
    whole: list[torch.Tensor] = []
    chunked: list[torch.Tensor] = []
    for results, limit in ((whole, DEFAULT_CHUNK_BYTES), (chunked, 7 * 64 * 4)):
        for layer, x in ((linear, maps.flatten(2).mT), (conv, maps)):
            weight = quantize_matrix(packed_format.to_matrix(layer.weight.detach()), 64)
            packed = make_packed_layer(layer, weight.layout)
            fill(packed, weight, layer.bias.detach().to(dtype))  # type: ignore[union-attr]
            with limit_chunk_bytes(limit):
                results.append(packed(x).float())
                assert (len(list(packed.dequantized_chunks(dtype))) > 1) == (results is chunked)
    torch.testing.assert_close(chunked, whole, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dequantizing_to_half_precision_rounds_once(layout: Layout, dtype: torch.dtype) -> None:
    weight = random_weight(layout, 6)
    assert torch.equal(dequantize.dequantize(weight, torch.empty(6, COLUMNS, dtype=dtype)), dense(weight).to(dtype))


@given(st.integers(1, 3000), st.integers(1, 12000), st.integers(1, 2**24))
def test_chunks_fit_and_are_whole_blocks(rows: int, columns: int, max_bytes: int) -> None:
    count = dequantize.rows_per_chunk(rows, columns, torch.bfloat16, max_bytes)
    assert 1 <= count <= rows
    assert (count - 1) * columns * 2 < max_bytes
    assert count == rows or count < dequantize.ONEDNN_BLOCK_ROWS or count % dequantize.ONEDNN_BLOCK_ROWS == 0


@pytest.mark.parametrize("keeps_dequantized", [False, True])
def test_convolution_of_a_small_map_runs_in_chunks(monkeypatch: pytest.MonkeyPatch, keeps_dequantized: bool) -> None:
    torch.manual_seed(6)
    conv = nn.Conv2d(64, 200, 3, padding=1)
    layer = make_packed_layer(conv, Layout(2, 64))
    weight = quantize_matrix(packed_format.to_matrix(conv.weight.detach()), 64)
    fill(layer, weight, conv.bias.detach() if conv.bias is not None else None)
    layer.keeps_dequantized = keeps_dequantized
    kernels = dense(weight).view(200, 3, 3, 64).permute(0, 3, 1, 2)
    monkeypatch.setattr(layers, "MAX_ONEDNN_COPY_BYTES", 70 * 576 * 4)
    chunk_rows: list[int] = []
    convolve = PackedConv2d.convolve

    def record(layer: PackedConv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        chunk_rows.append(len(weight))
        return convolve(layer, x, weight, bias)

    monkeypatch.setattr(PackedConv2d, "convolve", record)
    for side, expected_rows in ((4, [64, 64, 64, 8]), (48, [200])):
        x = torch.randn(1, 64, side, side)
        torch.testing.assert_close(layer(x), F.conv2d(x, kernels, conv.bias, 1, 1), rtol=1e-4, atol=1e-4)
        assert chunk_rows == expected_rows
        chunk_rows.clear()


def test_tap_major_order() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)  # out, in, kernel rows, kernel columns
    assert packed_format.to_matrix(weight)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize(("columns", "size"), [(576, 64), (288, 32), (144, 16), (36, None), (8, None)])
def test_group_size_is_the_largest_that_divides_the_row(columns: int, size: int | None) -> None:
    assert packed_format.choose_group_size(columns) == size
