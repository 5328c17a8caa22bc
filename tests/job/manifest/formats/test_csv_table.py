"""Tables as spreadsheets, pandas and other programs write them, and the reader's notes about them."""

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.manifests import get_reason, write_and_read
from tests.support.program import Capture, call
from tinysd_batch.errors import ManifestError
from tinysd_batch.job.manifest.readers import read_extra_fields
from tinysd_batch.records import InvalidRow, Row


def prompts_and_seeds(rows: list[Row | InvalidRow]) -> list[tuple[int, str, int | None]]:
    assert all(isinstance(row, Row) for row in rows), rows
    return [(row.number, row.prompt, row.seed) for row in rows if isinstance(row, Row)]


# Integers and missing numbers

INTEGERS = {
    "m.csv": "prompt,seed,steps,n_samples\ncat,42.0,3.0,2.00\n",
    "m.tsv": "prompt\tseed\tsteps\tn_samples\ncat\t42.\t3.0\t2\n",
    "m.jsonl": '{"prompt": "cat", "seed": 42.0, "steps": "3.0", "n_samples": 2e0}\n',
    "m.json": '[{"prompt": "cat", "seed": 42.0, "steps": 3.0, "n_samples": "2.0"}]',
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_can_be_written_as_floats(tmp_path: Path, name: str) -> None:
    (row,), _ = write_and_read(tmp_path / name, INTEGERS[name])
    assert isinstance(row, Row), row
    assert (row.seed, row.settings.steps, row.n_samples) == (42, 3, 2)


@pytest.mark.parametrize("cell", ["42.5", "1e30", "4 2", "1,000", "inf", "true"])
def test_other_numbers_are_not_integers(tmp_path: Path, cell: str) -> None:
    (row,), _ = write_and_read(tmp_path / "m.csv", f'prompt,seed\ncat,"{cell}"\n')
    assert get_reason(row) == f"column seed = '{cell}': a whole number was expected"


def test_plan_accepts_integers_that_pandas_writes_as_floats(here: Path, capfd: Capture, tiny_model: Path) -> None:
    (here / "m.csv").write_text("prompt,seed,steps\nred apple,42.0,3.0\nblue heart,,\n")
    code, stdout, stderr = call(capfd, "plan", "m.csv", "--model", tiny_model)
    assert (code, stderr) == (0, "")
    assert "2 in 2 batches" in stdout


@pytest.mark.parametrize("spelling", ["", " ", "None", "nan", "NaN", "NULL", "null", "N/A", "<NA>", "\u200b", "\u00a0"])
def test_every_spelling_of_a_missing_number(tmp_path: Path, spelling: str) -> None:
    (row,), _ = write_and_read(
        tmp_path / "m.csv", f"prompt,seed,steps,scale,sampler\ncat,{spelling},{spelling},{spelling},{spelling}\n"
    )
    assert isinstance(row, Row), row
    assert (row.seed, row.settings.steps, row.settings.scale, row.settings.sampler) == (None, 25, 4.0, "plms")


@pytest.mark.parametrize("cell", ["-1", "-1.0", " -1"])
def test_seed_minus_one_is_no_seed(tmp_path: Path, cell: str) -> None:
    rows, _ = write_and_read(tmp_path / "m.csv", f"prompt,seed\ncat,{cell}\ndog,-2\n")
    assert isinstance(rows[0], Row)
    assert rows[0].seed is None
    assert "must be between 0" in get_reason(rows[1])


def test_missing_value_words_in_a_prompt_are_text_and_noted(tmp_path: Path) -> None:
    rows, notes = write_and_read(
        tmp_path / "m.csv", "prompt,negative_prompt\ncat,\nnan,\nNone,\ndog,NULL\nnan apple,\n"
    )
    assert [row.prompt for row in rows] == ["cat", "nan", "None", "dog", "nan apple"]
    assert notes == [
        "prompts that look like a missing value (nan, None, NULL), read as text: 3 (first: row 2)"
    ]  # fmt: skip


# Empty columns and short rows


def test_empty_columns_of_spreadsheets_are_ignored(tmp_path: Path) -> None:
    padding = "," * 2000  # Excel may write 16,384
    rows, notes = write_and_read(tmp_path / "m.csv", f"prompt,seed{padding}\r\nred apple,7{padding}\r\n", strict=True)
    assert prompts_and_seeds(rows) == [(1, "red apple", 7)]
    assert (rows[0].extra, notes) == ({}, [])
    assert read_extra_fields(tmp_path / "m.csv", []) == []


def test_unnamed_column_with_values_is_kept(tmp_path: Path) -> None:
    """pandas writes its index as a column without a name."""
    rows, _ = write_and_read(tmp_path / "m.csv", ",prompt\n5,cat\n")
    assert rows[0].extra == {"": "5"}
    assert [field.name for field in read_extra_fields(tmp_path / "m.csv", [""])] == [""]
    with pytest.raises(ManifestError, match="line 2: '5' is in a column without a name"):
        write_and_read(tmp_path / "m.csv", ",prompt\n5,cat\n", strict=True)


def test_several_unnamed_columns_are_dropped(tmp_path: Path) -> None:
    rows, notes = write_and_read(tmp_path / "m.csv", "prompt,,\ncat,a,b\n")
    assert prompts_and_seeds(rows) == [(1, "cat", None)]
    assert notes == ["column '': not copied to the results, several columns have no name"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", "prompt,seed,note\r\nred apple,7,\r\n,,\r\n , ,\u00a0\r\nblue heart,8,\r\n"),
        ("m.csv", "prompt,seed,note\r\nred apple,7,\r\n,,,,,\r\n,\r\nblue heart,8,\r\n"),
        ("m.jsonl", '{"text": "red apple", "seed": 7}\n{}\n{"text": null, "x":NaN}\n{"text": "blue heart", "seed": 8}'),
    ],
)  # fmt: skip
def test_blank_rows_are_skipped_and_keep_their_numbers(tmp_path: Path, name: str, content: str) -> None:
    rows, notes = write_and_read(tmp_path / name, content)
    assert prompts_and_seeds(rows) == [(1, "red apple", 7), (4, "blue heart", 8)]
    assert notes == ["2 blank rows skipped"]


def test_short_row_has_empty_cells_and_long_row_is_invalid(tmp_path: Path) -> None:
    rows, _ = write_and_read(tmp_path / "m.csv", "prompt,seed,note\ncat\ndog,1\nowl,1,2,3\nfox,1,2,,\n")
    assert prompts_and_seeds([rows[0], rows[1], rows[3]]) == [(1, "cat", None), (2, "dog", 1), (4, "fox", 1)]
    assert "4 cells where the header has 3 columns" in get_reason(rows[2])


@pytest.mark.parametrize("name", ["m.csv", "m.tsv.gz", "m.jsonl", "m.json"])
def test_long_value_of_an_extra_column_is_dropped(tmp_path: Path, name: str) -> None:
    """Images encoded as text, for example."""
    objects = [{"prompt": "cat", "image": "x" * 300_000, "n": "1"}, {"prompt": "dog", "image": "y", "n": "2"}]
    lines = [json.dumps(row) for row in objects]
    if "sv" in name:
        lines = [
            ("\t" if "tsv" in name else ",").join(cells) for cells in (objects[0], *(row.values() for row in objects))
        ]
    content = json.dumps(objects, indent=1) if name == "m.json" else "\n".join(lines)
    rows, notes = write_and_read(tmp_path / name, content)
    assert [(row.prompt, row.extra) for row in rows] == [("cat", {"n": "1"}), ("dog", {"image": "y", "n": "2"})]
    limit = "some values are not copied to the results: 300,000 characters, at most 131,072"
    assert notes == [f"column 'image': {limit}"]


# Separators and encodings


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("m.csv", 'prompt;seed;scale\n"red; apple";7;7,5\n', "cells are separated by semicolons"),
        ("m.csv", '"prompt";"seed";"scale"\n"red; apple";"7";"7,5"\n', "cells are separated by semicolons"),
        ("m.csv", '\ufeffsep=;\r\nprompt;seed;scale\r\n"red; apple";7;7.5\r\n', "cells are separated by semicolons"),
        ("m.csv", "prompt\tseed\tscale\nred; apple\t7\t7,5\n", "cells are separated by tabs"),
        ("m.tsv", '"prompt";"seed";"scale"\n"red; apple";7;7,5\n', "cells are separated by semicolons"),
        ("m.csv", '\n\n"pro\u200bmpt" ;seed;"scale"\n"red; apple";7;7,5\n', "cells are separated by semicolons"),
        ("m.csv", 'prompt, seed, "scale"\n"red; apple" , 7, "7.5"\n', None),
        ("m.csv", ',,\n"",,\nprompt,seed,scale\nred; apple,7,7.5\n', None),
    ],
)
def test_header_determines_the_separator(tmp_path: Path, name: str, content: str, note: str | None) -> None:
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        (row,), notes = write_and_read(path, content)
        assert isinstance(row, Row), row
        assert (row.prompt, row.seed, row.settings.scale) == ("red; apple", 7, 7.5)
        assert notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("prompt\ncat; dog\n", "cat; dog"),
        ("prompt,note;seed\ncat; dog,1\n", "cat; dog"),
        ("prompt;a,b\ncat, dog;1\n", "cat, dog"),
        ('"prompt","a;b;c"\ncat; dog,1\n', "cat; dog"),
    ],
)
def test_other_separators_in_text_are_not_separators(tmp_path: Path, content: str, prompt: str) -> None:
    (row,), _ = write_and_read(tmp_path / "m.csv", content)
    assert row.prompt == prompt


@pytest.mark.parametrize("cell", ["1.000", "1,000", "12.000"])
def test_ambiguous_thousands_separator_is_an_error(tmp_path: Path, cell: str) -> None:
    (row,), _ = write_and_read(tmp_path / "m.csv", f"prompt;seed\ncat;{cell}\n")
    assert f"column seed = '{cell}': ambiguous thousands separator" in get_reason(row)
    assert row.prompt == "cat"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", "prompt,seed\r\ngröße 😀,7\r\n"),
        ("m.csv", "prompt\tseed\r\ngröße 😀\t7\r\n"),
        ("m.tsv.gz", "prompt\tseed\r\ngröße 😀\t7\r\n"),
        ("m.jsonl", '{"prompt": "größe 😀", "seed": 7}\n'),
        ("m.json", '[{"prompt": "größe 😀", "seed": 7}]\n'),
    ],
)
def test_utf_16_is_read(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    rows, notes = write_and_read(tmp_path / name, f"\ufeff{content}".encode(encoding))
    assert prompts_and_seeds(rows) == [(1, "größe 😀", 7)]
    assert notes[0] == "read as UTF-16"


def test_utf_16_text(tmp_path: Path) -> None:
    rows, _ = write_and_read(tmp_path / "m.txt", "größe\r\ncat\r\n".encode("utf-16"))
    assert [row.prompt for row in rows] == ["größe", "cat"]


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ('"a, b", 7, "c, d"', ("a, b", "c, d")),
        (' "a, b" , 7 , "c, d"  ', ("a, b", "c, d")),
        ('"a, ""b"", ""c""",7,d', ('a, "b", "c"', "d")),
        (' a,7, d', (" a", " d")),
        ('a "quoted" word,7, 5" nail', ('a "quoted" word', ' 5" nail')),
        ('a, 7, "two\nlines" ', ("a", "two\nlines")),
        ('"one\ntwo" , 7, "c, d"', ("one\ntwo", "c, d")),
        (' "one\n, ""two"" " ,7, "c, d"', ('one\n, "two" ', "c, d")),
    ],
)  # fmt: skip
def test_blanks_around_quotes(tmp_path: Path, line: str, cells: tuple[str, str]) -> None:
    rows, _ = write_and_read(tmp_path / "m.csv", f"prompt, seed, negative_prompt\n{line}\nnext,8,\n")
    first, last = rows
    assert isinstance(first, Row), first
    assert (first.prompt, first.settings.negative_prompt, first.seed, last.prompt) == (*cells, 7, "next")


# Lines of errors


def test_invalid_row_has_its_line(tmp_path: Path) -> None:
    content = 'prompt,seed\n"two\nlines",1\n\ncat,x\n,,,\nowl,1,2\n"a\nb",y\n'
    rows, _ = write_and_read(tmp_path / "m.csv", content)
    assert [(row.number, row.line) for row in rows if isinstance(row, InvalidRow)] == [(2, 5), (4, 7), (5, 8)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('cat,1\n"red apple,2\nblue heart,3\nowl,4\n', "opens in line 3 is not closed and includes the 2 lines after"),
        ('"a\nb","red apple\nblue heart,3\n', "opens in line 3 is not closed and includes the line after it"),
        ('"red apple\nblue "heart,3\n', "opens in line 2 is not closed and includes the line after it"),
        ('cat,1\n"red apple', "opens in line 3 is not closed; check the quotes there"),
        ('"' + f"{'x' * 1000}\n" * 300, "over 262,144 characters: the quote that opens in line 2 is not closed"),
    ],
)  # fmt: skip
def test_unclosed_quote_is_reported_with_its_line(tmp_path: Path, lines: str, message: str) -> None:
    rows, _ = write_and_read(tmp_path / "m.csv", f"prompt,seed\n{lines}")
    assert message in next(row.reason for row in rows if isinstance(row, InvalidRow))


def test_unclosed_quote_in_the_header(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="header: the quote that opens in line 1 is not closed"):
        write_and_read(tmp_path / "m.csv", 'prompt,"seed\ncat,1\n')


def test_every_command_reports_row_and_line(here: Path, capfd: Capture, tiny_model: Path) -> None:
    (here / "m.csv").write_text('prompt,seed\n"two\nlines",1\ncat,x\n')
    arguments = ["m.csv", "--model", tiny_model]
    outputs = [
        call(capfd, "plan", *arguments)[1],
        call(capfd, "submit", *arguments, "--inline", "-o", "job")[1],
        call(capfd, "submit", *arguments, "--inline", "-o", "job")[1],
        call(capfd, "status", "job")[1],
        call(capfd, "txt2img", "--from-file", *arguments)[2],
    ]
    for output in outputs:
        assert "row 2 (line 4)" in output
        assert "column seed = 'x': a whole number was expected" in output


# Invisible characters


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", 'prompt,Negative\u00a0prompt\n\ufeff"red \u200bapple",\u202eblur\u00adry\n'),
        ("m.csv", "\u200eprompt,\u2060negative\u3000prompt\u200b\nred apple,blurry\n"),
        ("m.jsonl", '\ufeff\n\ufeff{"prompt": "red\u00a0apple", "negative\u2009prompt": "\u200bblurry"}\n'),
        ("m.json", '\ufeff[{"prompt": "red \ufeffapple", "negative_prompt": "blurry\u200f"}]\n'),
        ("m.txt", '\ufeff--prompt "red apple" \u00a0--negative_prompt "blurry"\n'),
    ],
)
def test_names_and_text_are_normalized(tmp_path: Path, name: str, content: str) -> None:
    (row,), _ = write_and_read(tmp_path / name, content)
    assert isinstance(row, Row), row
    assert (row.prompt, row.settings.negative_prompt, row.extra) == ("red apple", "blurry", {})


def test_joiners_are_kept(tmp_path: Path) -> None:
    rows, _ = write_and_read(tmp_path / "m.txt", "\ufeff👨\u200d👩\n\ufeffمی\u200cخ\n")
    assert [row.prompt for row in rows] == ["👨\u200d👩", "می\u200cخ"]


def test_names_that_normalize_to_the_same_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="column 'note' appears twice"):
        write_and_read(tmp_path / "m.csv", "prompt,note,no\u200bte\ncat,a,b\n")


# Samplers


def test_samplers_in_a_column(tmp_path: Path) -> None:
    rows, _ = write_and_read(
        tmp_path / "m.csv", "prompt,sampler\ncat,k_euler_ancestral\ndog,DPM++ 2M Karras\nowl,DDIMScheduler\n"
    )
    assert isinstance(rows[0], Row)
    assert isinstance(rows[2], Row)
    assert (rows[0].settings.sampler, rows[2].settings.sampler) == ("euler_a", "ddim")
    assert "dpmpp_2m is supported, but its Karras schedule is not" in get_reason(rows[1])


CELLS = st.text(st.sampled_from('ab ,;"\n\t='), min_size=1, max_size=12).filter(lambda cell: bool(cell.strip()))


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), st.sampled_from(",;\t"), st.sampled_from([0, 1]))
def test_output_of_the_csv_module_is_read_back_unchanged(cells: list[tuple[str, str]], mark: str, quoting: Any) -> None:
    sheet = io.StringIO()
    writer = csv.writer(sheet, delimiter=mark, quoting=quoting, lineterminator="\r\n")
    writer.writerows([("prompt", "note"), *cells])
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = write_and_read(
            Path(folder) / "m.csv",
            sheet.getvalue(),
        )
    assert [(row.prompt, row.extra["note"]) for row in rows] == cells
