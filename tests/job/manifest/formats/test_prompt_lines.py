"""Lines of a text file with options as other programs write them."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.manifests import get_reason, write_and_read
from tests.support.program import Capture, call
from tinysd_batch.records import InvalidRow, Row


def get_settings(row: Row | InvalidRow) -> dict[str, Any]:
    """Return the settings of the row that differ from the defaults."""
    assert isinstance(row, Row), row
    settings = {
        "prompt": row.prompt, "negative": row.settings.negative_prompt, "seed": row.seed, "steps": row.settings.steps,
        "scale": row.settings.scale, "sampler": row.settings.sampler, "size": (row.settings.width, row.settings.height),
        "images": (row.n_iter, row.n_samples),
    }  # fmt: skip
    defaults = {
        "negative": "",
        "seed": None,
        "steps": 25,
        "scale": 4.0,
        "sampler": "plms",
        "size": (64, 64),
        "images": (1, 1),
    }
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            '--prompt "x" --negative_prompt "y" --steps 20 --seed 7',
            {"prompt": "x", "negative": "y", "steps": 20, "seed": 7},
        ),
        ("--prompt a cat on a mat --cfg_scale 5", {"prompt": "a cat on a mat", "scale": 5.0}),
        ('--steps 3.0 --seed -1 --prompt "say \\"hi\\""', {"prompt": 'say "hi"', "steps": 3}),
        (
            '--prompt x --sampler_name "Euler a" --width 32 --height 48 --batch_size 2 --n_iter 3',
            {"prompt": "x", "sampler": "euler_a", "size": (32, 48), "images": (3, 2)},
        ),
        ("  --Negative-Prompt=y --prompt=x", {"prompt": "x", "negative": "y"}),
        ('--prompt "a -n4" --do_not_save_grid true', {"prompt": "a -n4"}),
    ],
)  # fmt: skip
def test_web_ui_lines(tmp_path: Path, line: str, expected: dict[str, Any]) -> None:
    rows, notes = write_and_read(tmp_path / "m.txt", f"cat\n{line}\n")
    assert [get_settings(row) for row in rows] == [{"prompt": "cat"}, expected]
    assert notes == ["lines with options of the web UI, parsed as it does: 1 (first: row 2)"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('--prompt "x', "No closing quotation"),
        ("--prompt x --styles a", "unknown option '--styles'; remove it"),
        ("--prompt x --steps", "'--steps' has no value"),
        ("--prompt x --steps many", "column steps = 'many': a whole number was expected"),
        ("--prompt x --prompt y", "prompt is given twice"),
        ("--prompt --steps 3", "column prompt is empty"),
        ("--prompt " + "x" * 50_000, "50009 characters, at most 40000"),
    ],
)
def test_web_ui_lines_with_errors(tmp_path: Path, line: str, message: str) -> None:
    (bad, good), _ = write_and_read(tmp_path / "m.txt", f"{line}\ncat\n")
    assert message in get_reason(bad)
    assert good.prompt == "cat"


FOREIGN = '"a unicorn" -n4 -H512 -S1234\n# a comment\na cat --ar 16:9\n// another\n\na cat - 5 mice, x-5 -- dash\n'


def test_a_word_after_the_value_of_an_option_makes_the_row_invalid(tmp_path: Path) -> None:
    (bad,), _ = write_and_read(tmp_path / "m.txt", "a cat -n4 dog\n", interpret_lines=True)
    assert "dog follows the value of an option" in get_reason(bad)


def test_other_lines_are_text_and_noted(tmp_path: Path) -> None:
    rows, notes = write_and_read(tmp_path / "m.txt", FOREIGN)
    assert [row.prompt for row in rows] == [line for line in FOREIGN.splitlines() if line]
    assert notes == [
        "lines with options of another program, read as text: 2 (first: row 1); --interpret-lines parses them",
        "lines that look like comments, read as prompts: 2 (first: row 2); --interpret-lines skips them",
    ]


def test_interpret_lines_parses_other_lines(tmp_path: Path) -> None:
    more = "an owl -s 9 -C 7.5 -A k_euler_a -W 32\n"
    rows, notes = write_and_read(tmp_path / "m.txt", FOREIGN + more, interpret_lines=True)
    assert get_settings(rows[0]) == {"prompt": "a unicorn", "seed": 1234, "size": (64, 512), "images": (4, 1)}
    assert "unknown option '--ar'" in get_reason(rows[1])
    assert get_settings(rows[2]) == {"prompt": "a cat - 5 mice, x-5 -- dash"}
    expected = {"prompt": "an owl", "steps": 9, "scale": 7.5, "sampler": "euler_a", "size": (32, 64)}
    assert get_settings(rows[3]) == expected
    assert [row.number for row in rows] == [1, 3, 5, 6]
    assert notes == ["comments skipped: 2 (first: row 2)"]


def test_table_saved_as_unicode_text(tmp_path: Path) -> None:
    (row,), notes = write_and_read(tmp_path / "m.txt", "Prompt\tSeed\tNote\r\ncat\t7\tx\r\n".encode("utf-16"))
    assert (get_settings(row), row.extra) == ({"prompt": "cat", "seed": 7}, {"Note": "x"})
    assert notes == [
        "read as UTF-16",
        "cells are separated by tabs",
        "read as a table, since the first line is a header",
    ]
    rows, _ = write_and_read(tmp_path / "m.txt", "a prompt\twith tabs\nprompt\n")
    assert [row.prompt for row in rows] == ["a prompt\twith tabs", "prompt"]


def test_txt2img_prints_notes_and_interprets_lines(here: Path, capfd: Capture, tiny_model: Path) -> None:
    (here / "p.txt").write_text("# two cats\ncat -n2 -S5\n")
    arguments = ["txt2img", "--from-file", "p.txt", "--model", tiny_model, "--skip_save"]
    code, stdout, stderr = call(capfd, *arguments)
    assert (code, stdout.count("  seed ")) == (0, 2)
    assert "p.txt: lines that look like comments, read as prompts: 1 (first: row 1)" in stderr
    code, stdout, stderr = call(capfd, *arguments, "--interpret-lines")
    assert (code, stderr) == (0, "p.txt: comments skipped: 1 (first: row 1)\n")
    assert [line.split("seed ")[1] for line in stdout.splitlines() if "  seed " in line] == ["5", "6"]
