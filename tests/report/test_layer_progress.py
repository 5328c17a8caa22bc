"""The bar over layers while a model is quantized (case 30)."""

import io

import pytest
from rich.console import Console

from tinysd_batch.quantize.layer_progress import LayerProgressUpdate, iterate_with_progress
from tinysd_batch.report.quantization.layer_progress import LayerProgressBar


def feed(console: Console, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hundred layers, a second each; the last has half of all weights and takes a hundred."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    weights = {f"layer {number}": 100 for number in range(100)} | {"last": 10_000}
    with LayerProgressBar(console) as progress:
        for name in iterate_with_progress(weights, weights, "packing", progress.show):
            progress.bar.refresh()
            now += weights[name] / 100
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = feed(Console(file=io.StringIO(), width=80), monkeypatch).splitlines()
    assert lines[0] == "packing: 10 of 101 layers, elapsed 0:10, about 3:10 left"
    assert lines[9] == "packing: 100 of 101 layers, elapsed 1:40, about 1:40 left"
    assert lines[10:] == ["packing: 101 layers in 3:20"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})
    text = feed(console, monkeypatch)
    assert "50 of 101 layers, elapsed 0:50, about 2:30 left" in text
    assert "━" in text
    assert "packing: 101 layers in 3:20" in text


def test_every_layer_is_told_once_and_the_end() -> None:
    seen: list[LayerProgressUpdate] = []
    assert list(iterate_with_progress(["a", "b"], {"a": 1, "b": 3}, "packing", seen.append)) == ["a", "b"]
    assert [(one.done_layers, one.total_layers, one.weights_fraction) for one in seen] == [
        (0, 2, 0.0),
        (1, 2, 0.25),
        (2, 2, 1.0),
    ]
    assert list(iterate_with_progress([], {}, "packing", seen.append)) == []
