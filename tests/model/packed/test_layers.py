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
from tinysd_batch.model.packed import dequantize, fbgemm, format, layers
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

BITS = st.sampled_from(format.SUPPORTED_BITS)
LAYOUTS = [
    Layout(2, 64), Layout(2, 16), Layout(4, 32), Layout(8, 64), Layout(2, 128), Layout(2, 256), Layout(2, WHOLE_ROW),
    Layout(8, WHOLE_ROW), Layout(2, None), Layout(8, None),
]  # fmt: skip
COLUMNS = 768  # which all of them divide
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from(format.GROUP_SIZES))


@given(st.integers(1, 7), st.integers(1, 40), BITS, st.integers(0, 2**32 - 1))
def test_codes_survive_packing(rows: int, quads: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, quads * 4), dtype=torch.uint8, generator=generator)
    layers = format.pack_codes(codes, bits)
    assert layers.shape == (rows, quads * bits // 2)
    assert torch.equal(format.unpack_codes(layers, bits), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert format.pack_codes(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00_11_10_01]]
    assert format.pack_codes(torch.tensor([[1, 10]], dtype=torch.uint8), 4).tolist() == [[0b1010_0001]]


def random_rows(count: int, group: int, bits: int, seed: int) -> torch.Tensor:
    """FBGEMM rows with every kind of finite scale and offset, signs and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count, group * bits // 8), dtype=torch.uint8, generator=generator)
    numbers = torch.randint(-(2**15), 2**15, (count, 2), generator=generator).to(torch.int16).view(torch.float16)
    finite = torch.where(numbers.isfinite(), numbers, torch.zeros_like(numbers))
    return fbgemm.to_fbgemm_rows(codes, finite, bits)


@pytest.mark.skipif(
    not fbgemm.has_fbgemm(), reason="this torch has no FBGEMM operator, so the program uses plain torch"
)
@given(st.integers(1, 5000), st.sampled_from(format.GROUP_SIZES), BITS, st.integers(0, 2**32 - 1))
def test_fbgemm_and_plain_torch_agree_to_the_bit(count: int, group: int, bits: int, seed: int) -> None:
    rows = random_rows(count, group, bits, seed)
    assert torch.equal(fbgemm.dequantize_rows_fbgemm(rows, bits), fbgemm.dequantize_rows_torch(rows, bits))


@given(SHAPES, BITS, st.integers(0, 2**32 - 1))
def test_rows_hold_code_times_scale_plus_offset(shape: tuple[int, int, int], bits: int, seed: int) -> None:
    out, groups, size = shape
    matrix = torch.randn(out, groups * size, generator=torch.Generator().manual_seed(seed))
    weight = quantize_matrix(matrix, size, bits)
    assert weight.layout == Layout(bits, size)
    scale, offset = format.get_scales_and_offsets(weight)
    codes = format.unpack_codes(weight.qweight, bits).view(out, groups, size).float()
    expected = codes * scale.float().unsqueeze(-1) + offset.float().unsqueeze(-1)
    assert torch.equal(dense(weight).view(out, groups, size), expected)


@given(st.integers(1, 9), st.integers(1, 40), BITS, st.integers(0, 2**32 - 1))
def test_a_whole_row_is_one_group_without_its_table(rows: int, quads: int, bits: int, seed: int) -> None:
    matrix = torch.randn(rows, 4 * quads, generator=torch.Generator().manual_seed(seed))
    group = quantize_matrix(matrix, 4 * quads, bits)
    row = group.convert_to(Layout(bits, WHOLE_ROW))
    assert isinstance(row, AffineRowWeight)
    assert set(row.tensors()) == {"qweight", "qaffine"}
    assert torch.equal(dense(row), dense(group))


def random_row_weight(rows: int, columns: int, bits: int, seed: int) -> ZeroPointRowWeight:
    """As the origin's checkpoint may hold it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (rows,), generator=generator).to(torch.uint8)
    delta = torch.randn(rows, generator=generator).abs() * 10 ** torch.randn(rows, generator=generator)
    return ZeroPointRowWeight(codes, zero, delta.view(torch.int32), bits=bits)


def random_weight(layout: Layout, rows: int) -> PackedWeight:
    """Of COLUMNS columns, in any layout."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(kind)
        for name, (kind, shape) in layout.tensors(rows, COLUMNS).items()
    }
    if layout.group_size is None:
        tensors["qdelta"] = torch.rand(rows, generator=generator).view(torch.int32)
    return layout.weight(tensors)


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([2, 8]), st.integers(0, 2**32 - 1))
def test_rows_of_the_origin_are_code_less_zero_times_delta(rows: int, quads: int, bits: int, seed: int) -> None:
    weight = random_row_weight(rows, 4 * quads, bits, seed)
    codes = format.unpack_codes(weight.qweight, bits)
    expected = (codes.float() - weight.qzero.float()[:, None]) * weight.qdelta.view(torch.float32)[:, None]
    assert torch.equal(dense(weight), expected)


@examples(10)
@given(st.integers(1, 400), st.sampled_from([64, 640, 5760]), st.integers(0, 2**32 - 1))
def test_all_ways_of_unpacking_agree_to_the_bit(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weights: list[PackedWeight] = [quantize_matrix(matrix, 64, bits) for bits in format.SUPPORTED_BITS]
    whole = [
        quantize_matrix(matrix, columns, bits).convert_to(Layout(bits, WHOLE_ROW)) for bits in format.SUPPORTED_BITS
    ]
    for weight in (*weights, *whole, random_row_weight(rows, columns, 2, seed)):
        by_torch = dequantize.dequantize(weight, torch.empty(rows, columns), fbgemm.dequantize_rows_torch)
        assert torch.equal(dense(weight), by_torch)
        assert torch.equal(dequantize_by_rows(weight, torch.empty(rows, columns)), by_torch)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of bytes that begins at an odd address, as in a file where tensors lie one behind the other."""
    room = torch.empty(tensor.numel() + 1, dtype=torch.uint8)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("lines", [1, 5, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_neither_steps_nor_addresses_change_a_bit(monkeypatch: pytest.MonkeyPatch, layout: Layout, lines: int) -> None:
    weight = random_weight(layout, 11)
    expected = dequantize.dequantize(weight, torch.empty(weight.shape), fbgemm.dequantize_rows_torch)
    monkeypatch.setattr(fbgemm, "WEIGHTS_PER_STEP", lines * (layout.group_size or COLUMNS))
    for unpack in (dequantize.dequantize, dequantize_by_rows):
        for changed in (weight, replace(weight, qweight=shifted(weight.qweight))):
            assert torch.equal(unpack(changed, torch.empty(weight.shape)), expected)
        assert torch.equal(unpack(weight.select_rows(slice(3, 9)), torch.empty(6, COLUMNS)), expected[3:9])


def test_what_unpacking_takes_is_seen_without_values() -> None:
    """Rows and floats of one step at least, and not twice as much."""
    weight = random_weight(Layout(2, 64), 1).map_tensors(lambda one: one.to("meta").expand(2048, -1).contiguous())
    out = torch.empty(weight.shape, device="meta")
    with torch.device("meta"), PeakMemoryTracker() as live:
        live.exclude([*weight.tensors().values(), out])
        dequantize_by_rows(weight, out)
    assert 4 * fbgemm.WEIGHTS_PER_STEP <= live.peak_bytes < 8 * fbgemm.WEIGHTS_PER_STEP


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_survives_the_configuration(layout: Layout) -> None:
    assert Layout.from_config_entry(layout.to_config_entry((8, 64))) == layout


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_weight_takes_the_bytes_that_its_layout_says(layout: Layout) -> None:
    weight = layout.weight(
        {name: torch.zeros(shape, dtype=kind) for name, (kind, shape) in layout.tensors(6, COLUMNS).items()}
    )
    assert weight.shape == (6, COLUMNS)
    assert weight.layout == layout
    assert sum(one.nbytes for one in weight.tensors().values()) == layout.nbytes(6, COLUMNS)


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
def test_other_layouts_are_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"expected a layer at 2, 4 or 8 bits in groups of 16, 32, 64, 128 or 256"):
        Layout.from_config_entry(entry)


def test_a_layout_does_not_store_half_a_group() -> None:
    with pytest.raises(ModelError, match="a row of 96 weights cannot be stored in 4 bits in groups of 64"):
        Layout(4, 64).tensors(8, 96)


@pytest.mark.parametrize(("bits", "least_db"), [(2, 8.5), (4, 21), (8, 44)])
def test_more_bits_lose_less(bits: int, least_db: float) -> None:
    matrix = torch.randn(64, 640, generator=torch.Generator().manual_seed(1))
    error = (dense(quantize_matrix(matrix, 64, bits)) - matrix).square().mean()
    assert float(-10 * error.log10()) > least_db


def fill(layer: PackedLayer, weight: PackedWeight, bias: torch.Tensor | None) -> None:
    for name, tensor in weight.tensors().items():
        setattr(layer, name, tensor)
    if bias is not None:
        layer.bias = nn.Parameter(bias)


def matrix(layer: PackedLayer) -> torch.Tensor:
    ((whole, _),) = layer.dequantized_chunks(torch.float32)
    return whole


def dense(weight: PackedWeight) -> torch.Tensor:
    return dequantize.dequantize(weight, torch.empty(weight.shape))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_a_linear_layer_on_the_unpacked_weight(bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(96, 20, bias=bias)
    weight = quantize_matrix(linear.weight.detach(), 32)
    layer = make_packed_layer(linear, weight.layout)
    fill(layer, weight, linear.bias.detach() if bias else None)
    x = torch.randn(3, 5, 96)
    assert torch.equal(layer(x), F.linear(x, dense(weight), linear.bias))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_packed_convolution_is_a_convolution_with_the_unpacked_weight(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(64, 24, kernel, stride, padding)
    weight = quantize_matrix(format.to_matrix(conv.weight.detach()), 64)
    layer = make_packed_layer(conv, weight.layout)
    fill(layer, weight, conv.bias.detach() if conv.bias is not None else None)
    x = torch.randn(2, 64, 9, 7)
    kernels = dense(weight).view(24, kernel, kernel, 64).permute(0, 3, 1, 2)
    expected = F.conv2d(x, kernels.contiguous(), conv.bias, stride, padding)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_layers_share_a_buffer_and_kept_ones_do_not() -> None:
    torch.manual_seed(3)
    first, second = (make_packed_layer(nn.Linear(64, 8), Layout(2, 64)) for _ in range(2))
    for layer in (first, second):
        fill(layer, quantize_matrix(torch.randn(8, 64), 64), None)
    assert matrix(first).data_ptr() == matrix(second).data_ptr()
    keep_dequantized(first)
    kept = matrix(first)
    before = kept.clone()
    matrix(second)
    assert matrix(first).data_ptr() == kept.data_ptr()
    assert torch.equal(kept, before)
    fill(first, quantize_matrix(torch.randn(8, 64), 64), None)
    assert not torch.equal(matrix(first), before)


def test_what_is_reserved_to_unpack_in_is_what_layers_use(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize.SCRATCH, "buffers", {})
    model = TinySD.from_pretrained(tiny_model, device="cpu", vram_budget="1GB")
    dequantize.SCRATCH.release(torch.device("cpu"))
    with torch.no_grad(), model.offloader.holding(model.encode_fragment, model.decode_fragment):
        model.predict_noise(torch.randn(1, 4, 8, 8), torch.tensor(500.0), torch.randn(1, 22, 32))
    used = dequantize.SCRATCH.buffers[torch.device("cpu")].numel()
    assert used == required_scratch_bytes(model.unet, model.dtype) > 0


def test_a_buffer_made_in_inference_mode_serves_outside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize.SCRATCH, "buffers", {})
    layer = make_packed_layer(nn.Linear(64, 8), Layout(2, 64))
    fill(layer, quantize_matrix(torch.randn(8, 64), 64), None)
    with torch.inference_mode():
        first = matrix(layer).clone()
    assert torch.equal(matrix(layer), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_matrix_larger_than_the_buffer_is_used_in_parts(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    linear, conv = nn.Linear(64, 50), nn.Conv2d(64, 50, 3, padding=1)
    maps = torch.randn(2, 64, 5, 5).to(dtype)
    whole: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    for results, room in ((whole, DEFAULT_CHUNK_BYTES), (parts, 7 * 64 * 4)):
        for layer, x in ((linear, maps.flatten(2).mT), (conv, maps)):
            weight = quantize_matrix(format.to_matrix(layer.weight.detach()), 64)
            layers = make_packed_layer(layer, weight.layout)
            fill(layers, weight, layer.bias.detach().to(dtype))  # type: ignore[union-attr]
            with limit_chunk_bytes(room):
                results.append(layers(x).float())
                assert (len(list(layers.dequantized_chunks(dtype))) > 1) == (results is parts)
    torch.testing.assert_close(parts, whole, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_unpacking_to_half_precision_rounds_once(layout: Layout, dtype: torch.dtype) -> None:
    weight = random_weight(layout, 6)
    assert torch.equal(dequantize.dequantize(weight, torch.empty(6, COLUMNS, dtype=dtype)), dense(weight).to(dtype))


@given(st.integers(1, 3000), st.integers(1, 12000), st.integers(1, 2**24))
def test_parts_fit_and_are_whole_blocks(rows: int, columns: int, most_bytes: int) -> None:
    found = dequantize.rows_per_chunk(rows, columns, torch.bfloat16, most_bytes)
    assert 1 <= found <= rows
    assert (found - 1) * columns * 2 < most_bytes
    assert found == rows or found < dequantize.ONEDNN_BLOCK_ROWS or found % dequantize.ONEDNN_BLOCK_ROWS == 0


@pytest.mark.parametrize("kept", [False, True])
def test_a_convolution_of_a_small_map_is_done_in_parts(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    torch.manual_seed(6)
    conv = nn.Conv2d(64, 200, 3, padding=1)
    layer = make_packed_layer(conv, Layout(2, 64))
    weight = quantize_matrix(format.to_matrix(conv.weight.detach()), 64)
    fill(layer, weight, conv.bias.detach() if conv.bias is not None else None)
    layer.keeps_dequantized = kept
    kernels = dense(weight).view(200, 3, 3, 64).permute(0, 3, 1, 2)
    monkeypatch.setattr(layers, "MAX_ONEDNN_COPY_BYTES", 70 * 576 * 4)
    counted: list[int] = []
    convolve = PackedConv2d.convolve

    def counting(layer: PackedConv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        counted.append(len(weight))
        return convolve(layer, x, weight, bias)

    monkeypatch.setattr(PackedConv2d, "convolve", counting)
    for side, parts in ((4, [64, 64, 64, 8]), (48, [200])):
        x = torch.randn(1, 64, side, side)
        torch.testing.assert_close(layer(x), F.conv2d(x, kernels, conv.bias, 1, 1), rtol=1e-4, atol=1e-4)
        assert counted == parts
        counted.clear()


def test_tap_major_order() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)  # out, in, kernel rows, kernel columns
    assert format.to_matrix(weight)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize(("columns", "size"), [(576, 64), (288, 32), (144, 16), (36, None), (8, None)])
def test_group_size_is_the_largest_that_divides(columns: int, size: int | None) -> None:
    assert format.choose_group_size(columns) == size
