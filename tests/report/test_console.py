"""Console sizes and colours; Docker and CI runners set COLUMNS=0."""

import io
import os

import pytest
from rich.console import Console

from tests.support.program import Capture, call
from tinysd_batch.report.console import drop_invalid_sizes, has_live_display, make_console
from tinysd_batch.report.formatting import print_line


@pytest.mark.parametrize(
    ("columns", "width"),
    [("0", 80), ("5", 80), ("19", 80), ("20", 20), ("132", 132), ("abc", 80), ("-3", 80), ("", 80), ("²", 80),
     ("٣٠", 80), ("1e3", 80), ("999999999999", 80)],
)  # fmt: skip
def test_invalid_columns_variable_is_ignored(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def no_terminal(_: int) -> os.terminal_size:
        raise OSError

    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    console = make_console()
    assert console.width == width
    assert console.height > 4
    print_line(console, "a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("columns", ["0", "7"])
def test_inspect_prints_at_any_width(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = call(capsys, "inspect", "embedded")
    assert code == 0
    assert "tinysd emoji 64" in out


def test_terminal_that_reports_no_or_little_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run -t` reports no size until the terminal is resized."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("LINES", raising=False)
    for size in ((0, 0), (1, 1), (12, 3)):
        monkeypatch.setattr(os, "get_terminal_size", lambda _, size=size: os.terminal_size(size))
        assert (make_console().width, make_console().height) == (80, 25)


def test_colours_and_live_lines_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI runners set it
    assert not has_live_display(make_console())
    monkeypatch.delenv("FORCE_COLOR")
    for name, live in (("xterm", True), ("dumb", False)):
        console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": name})
        assert has_live_display(console) is live


def test_other_variables_are_kept() -> None:
    environment = {"COLUMNS": "0", "LINES": "24", "NO_COLOR": "1"}
    assert drop_invalid_sizes(environment) == {"LINES": "24", "NO_COLOR": "1"}
