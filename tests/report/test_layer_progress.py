"""The progress bar over layers while a model is quantized."""

import io

import pytest
from rich.console import Console

from tinysd_batch.quantize.layer_progress import LayerProgressUpdate, iterate_with_progress
from tinysd_batch.report.quantization.layer_progress import LayerProgressBar


def feed(console: Console, monkeypatch: pytest.MonkeyPatch) -> str:
    """Quantize 100 layers in one second each, and a last one with half of all weights in 100 seconds."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    weights = {f"layer {number}": 100 for number in range(100)} | {"last": 10_000}
    with LayerProgressBar(console) as progress:
        for name in iterate_with_progress(weights, weights, "packing", progress.show):
            progress.bar.refresh()
            now += weights[name] / 100
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_show_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = feed(Console(file=io.StringIO(), width=80), monkeypatch).splitlines()
    assert lines[0] == "packing: 10 of 101 layers, elapsed 0:10, about 3:10 left"
    assert lines[9] == "packing: 100 of 101 layers, elapsed 1:40, about 1:40 left"
    assert lines[10:] == ["packing: 101 layers in 3:20"]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})
    text = feed(console, monkeypatch)
    assert "50 of 101 layers, elapsed 0:50, about 2:30 left" in text
    assert "━" in text
    assert "packing: 101 layers in 3:20" in text


def test_callback_is_called_once_per_layer_and_at_the_end() -> None:
    updates: list[LayerProgressUpdate] = []
    assert list(iterate_with_progress(["a", "b"], {"a": 1, "b": 3}, "packing", updates.append)) == ["a", "b"]
    assert [(update.done_layers, update.total_layers, update.weights_fraction) for update in updates] == [
        (0, 2, 0.0),
        (1, 2, 0.25),
        (2, 2, 1.0),
    ]
    assert list(iterate_with_progress([], {}, "packing", updates.append)) == []
