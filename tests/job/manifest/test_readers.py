"""Every format yields the same rows, and no broken or hostile file does worse than an error."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.manifests import DEFAULTS, get_reason, read_all_rows
from tests.support.paths import ROOT
from tests.support.program import environment
from tests.support.session import examples
from tinysd_batch.errors import ManifestError, UsageError
from tinysd_batch.job.manifest.columns import find_near_misses
from tinysd_batch.job.manifest.formats.text_lines import MAX_LINE_CHARACTERS
from tinysd_batch.job.manifest.readers import READERS_BY_SUFFIX
from tinysd_batch.job.manifest.validate import read_rows
from tinysd_batch.job.state.open_job import default_job_folder
from tinysd_batch.records import InvalidRow, Row

ROWS: list[dict[str, object]] = [
    {"prompt": "red apple", "seed": 7, "scale": 2.5, "id": "a", "artist": "me"},
    {"prompt": 'größer, "quoted" 😀', "seed": None, "scale": None, "id": None, "artist": None},
    {"prompt": "tabby cat:0.25 duck:0.75", "seed": 2**40, "scale": 3.0, "id": "c", "artist": "you; them"},
]
FORMATS = [suffix + gz_suffix for suffix in READERS_BY_SUFFIX for gz_suffix in ("", ".gz")]


def encode(rows: list[dict[str, object]], suffix: str) -> bytes:
    """Encode the rows in the format of the suffix. Plain text keeps only the prompts."""
    match suffix.removesuffix(".gz"):
        case ".csv" | ".tsv":
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ".tsv" in suffix else ",")
            writer.writeheader()
            writer.writerows(rows)
            data = text.getvalue().encode()
        case ".parquet" | ".pq":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            data = bytes(sink.getvalue())
        case ".txt":
            data = "".join(f"{row['prompt']}\n" for row in rows).encode()
        case _:
            data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    return gzip.compress(data) if suffix.endswith(".gz") else data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_jsonl(tmp_path: Path, *lines: str) -> Path:
    return write(tmp_path / "m.jsonl", "".join(f"{line}\n" for line in lines).encode())


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_yields_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": row["prompt"]} for row in ROWS] if ".txt" in suffix else ROWS
    (tmp_path / "expected.csv").write_bytes(encode(rows, ".csv"))
    path = tmp_path / f"M{suffix.upper()}"
    path.write_bytes(encode(rows, suffix))
    rows_read = read_all_rows(path)
    assert rows_read == read_all_rows(tmp_path / "expected.csv")
    assert [type(row) for row in rows_read] == [Row] * 3


def test_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "m.txt", b"\xef\xbb\xbfred apple\r\n\r\n  \n blue, heart\n\xff\nlast \xe2\x80\xa8 line")
    rows = read_all_rows(path)
    assert [row.prompt for row in rows] == ["red apple", " blue, heart", "?", "last   line"]
    assert "not UTF-8" in get_reason(rows[2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "cat"', "not a JSON object: Expecting ',' delimiter at character 17"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "cat", "prompt": "dog"}', "key 'prompt' appears twice"),
        ('{"prompt": "cat", "x": {"a": 1, "a": 2}}', "key 'a' appears twice"),
        ('{"prompt": "cat", "scale": -Infinity}', "-Infinity is not a JSON number"),
        ('{"prompt": "cat", "scale": 1e999}', "must be finite"),
        ('{"prompt": "cat", "scale": 1' + "0" * 400 + "}", "column scale"),
        ('{"prompt": "cat", "seed": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ('{"prompt": "cat", "seed": true}', "column seed = 'True': a whole number was expected"),
        ('{"prompt": "cat", "x": ' + "[" * 100_000 + "}", "nested too deep"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": "cat", "\\uD800": 1}', "half a character"),
        ('{"prompt": ["cat"]}', "column prompt: a single value was expected"),
        ('{"Text": 7}', "column Text = '7': text was expected"),
        ('{"prompt": "cat", "a\\u0000": 1}', "without NUL"),
        ('{"prompt": "cat", "cfg": 1, "scale": 2}', "columns 'cfg' and 'scale' both mean scale"),
        ('{"seed": 7}', "column prompt is empty"),
        ('{"prompt": "cat", "x": "' + "x" * MAX_LINE_CHARACTERS + '"}', "over 8,388,608 characters"),
    ],
)
def test_bad_object_invalidates_only_its_row(tmp_path: Path, line: str, message: str) -> None:
    first, invalid, last = read_all_rows(write_jsonl(tmp_path, '{"prompt": "cat"}', line, '{"caption": "dog"}'))
    assert message in get_reason(invalid)
    assert isinstance(invalid, InvalidRow)
    assert invalid.line == 2
    assert (first.prompt, last.prompt) == ("cat", "dog")


def test_extra_keys_of_objects_become_text(tmp_path: Path) -> None:
    line = '{"prompt": "cat", "seed": null, "a": {"b": [1, "ü"]}, "n": 7, "t": true, "s": "\\ud83d\\ude00", "e": ""}'
    (row,) = read_all_rows(write_jsonl(tmp_path, "", line))
    assert row.extra == {"a": '{"b": [1, "ü"]}', "n": "7", "t": "true", "s": "😀"}


def test_jsonl_without_any_prompt_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no object with a key named prompt; found 'seed', 'x'"):
        read_all_rows(write_jsonl(tmp_path, '{"seed": 1}', '{"x": 1}'))


@pytest.mark.parametrize("name", ["m.txt", "m.jsonl", "m.csv.gz"])
def test_file_without_rows_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match="the file is empty"):
        read_all_rows(write(tmp_path / name, b" \n\n"))
    with pytest.raises(ManifestError, match=r"no rows|found nothing"):
        read_all_rows(write(tmp_path / name, b"\n" * 5000))


def test_header_quoted_as_a_whole_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="the whole line is one cell: save the file again"):
        read_all_rows(write(tmp_path / "m.csv", b'"prompt;seed"\n"cat;1"\n'))


# Columns


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("Guidance Scale", "scale"),
        ("cfg", "scale"),
        ("CFG-scale", "scale"),
    ],
)
def test_scale_has_aliases(tmp_path: Path, name: str, field: str) -> None:
    (row,) = read_all_rows(write(tmp_path / "m.csv", f"PROMPT,{name}\ncat,3.5\n".encode()))
    assert isinstance(row, Row)
    assert (row.prompt, getattr(row.settings, field), row.extra) == ("cat", 3.5, {})


def test_all_other_aliases(tmp_path: Path) -> None:
    header = "caption,negative,num_images_per_prompt,H,W,ddim_steps,sampler_name,ddim_eta"
    (row,) = read_all_rows(write(tmp_path / "m.csv", f"{header}\ncat,dog,3,32,48,9,ddim,0.5\n".encode()))
    assert isinstance(row, Row)
    assert (row.prompt, row.settings.negative_prompt, row.n_samples, row.extra) == ("cat", "dog", 3, {})
    assert (row.settings.height, row.settings.width, row.settings.steps) == (32, 48, 9)
    assert (row.settings.sampler, row.settings.eta) == ("ddim", 0.5)


def test_errors_show_the_column_name_of_the_file(tmp_path: Path) -> None:
    rows = read_all_rows(write(tmp_path / "m.csv", b"Text,Num Images,DDIM_eta\ncat,x,\n,1,\ncat,1,1.5\n"))
    assert [get_reason(row).split(":")[0].split(";")[0] for row in rows] == [
        "column Num Images = 'x'", "column Text is empty", "column DDIM_eta = '1.5'",
    ]  # fmt: skip


def test_closest_name_is_the_prompt_and_others_are_extra_columns(tmp_path: Path) -> None:
    (row,) = read_all_rows(write(tmp_path / "m.csv", b"caption,text,Prompt\na,b,c\n"))
    assert (row.prompt, row.extra) == ("c", {"caption": "a", "text": "b"})
    (row,) = read_all_rows(write(tmp_path / "m.csv", b"caption,text\na,b\n"))
    assert (row.prompt, row.extra) == ("b", {"caption": "a"})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("prompt,Prompt", "columns 'prompt' and 'Prompt' both mean prompt; keep one"),
        ("prompt,steps,step", "columns 'steps' and 'step' both mean steps; keep one"),
        ("prompt," + "x" * 1001, "at most 1000 characters"),
    ],
)
def test_conflicting_columns_are_rejected(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_all_rows(write(tmp_path / "m.csv", f"{header}\n".encode()))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_strict_rejects_unknown_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(encode([{"prompt": "cat", "negatve_prompt": "dog", "artist": "me"}], suffix))
    assert read_all_rows(path)[0].extra == {"negatve_prompt": "dog", "artist": "me"}
    with pytest.raises(ManifestError, match=r"'negatve_prompt' \(did you mean negative_prompt\?\), 'artist'; rename"):
        list(read_rows(path, DEFAULTS, strict=True))


def test_strict_invalidates_objects_with_unknown_keys(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, '{"prompt": "cat", "sed": 1}', '{"prompt": "dog"}')
    cat, dog = read_rows(path, DEFAULTS, strict=True)
    assert "unknown column 'sed' (did you mean seed?)" in get_reason(cat)
    assert (cat.prompt, type(dog)) == ("cat", Row)


def test_near_misses() -> None:
    names = ["negatve_prompt", "Samplr", "text", "artist", "x" * 5000]
    assert find_near_misses(names) == {"negatve_prompt": "negative_prompt", "Samplr": "sampler"}


# Broken and hostile files


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if suffix.endswith(".gz")])
def test_truncated_or_damaged_gzip_is_an_error(tmp_path: Path, suffix: str) -> None:
    """The file is long enough for the damage to appear long after the first rows."""
    rng = random.Random(0)
    data = encode([{"prompt": rng.randbytes(40).hex()} for _ in range(5000)], suffix)
    middle = len(data) // 2
    damaged = (data[:middle], data[:-4], data[:middle] + b"\0\xff" * 20 + data[middle + 40 :], b"not gzip")
    for content in damaged:
        (tmp_path / f"m{suffix}").write_bytes(content)
        with pytest.raises(ManifestError, match=f"m{suffix}: damaged or truncated gzip"):
            read_all_rows(tmp_path / f"m{suffix}")


MEASURE_SCRIPT = """
import resource, sys
from pathlib import Path
from tests.support.manifests import DEFAULTS
from tinysd_batch.job.manifest.validate import read_rows
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
types = [type(row).__name__ for row in read_rows(Path(sys.argv[1]), DEFAULTS)]
print(peak() - before, types.count("Row"), types.count("InvalidRow"))
"""


def read_in_subprocess(path: Path) -> tuple[int, int, int]:
    """Read the file in a process of its own; return the added peak memory in MiB, and the valid and invalid rows."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_SCRIPT, str(path)],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    added_mib, valid, invalid = (int(word) for word in done.stdout.split())
    return added_mib, valid, invalid


@pytest.mark.parametrize(
    "name",
    [
        "m.csv.gz",
        "m.jsonl.gz",
        "m.txt",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("m.tsv.gz", "m.txt.gz")),
    ],
)
def test_huge_line_is_not_kept_in_memory(tmp_path: Path, name: str) -> None:
    start = b'{"prompt": "cat"}\n' if "jsonl" in name else b"prompt\ncat\n"
    path = write(tmp_path / name, start + b"x" * (50 << 20) + b"\n" + start)
    added_mib, valid, invalid = read_in_subprocess(path)
    assert added_mib < 25
    assert (valid, invalid) == (2 if "jsonl" in name else 3 if "sv" in name else 4, 1)


def test_csv_row_spanning_many_lines_is_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", b"prompt,seed\ncat,1\n" + b'"a\n",' * 100_000)
    rows = read_all_rows(path)
    assert rows[0].prompt == "cat"
    assert "over 262,144 characters" in get_reason(rows[1])


@pytest.mark.parametrize("gz_suffix", ["", pytest.param(".gz", marks=pytest.mark.slow)])
@pytest.mark.parametrize("column", ["prompt", "note", "nested"])
def test_parquet_bomb_is_read_in_bounded_memory(tmp_path: Path, column: str, gz_suffix: str) -> None:
    """A few kilobytes hold gigabytes: one huge value, referenced many times."""
    huge = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 1_000_000]))
    nested = pa.ListArray.from_arrays(pa.array(range(0, 3001, 30), pa.int32()), huge)
    table = {
        "prompt": pa.table({"prompt": huge}),
        "note": pa.table({"prompt": ["cat"] * 3000, "note": huge}),
        "nested": pa.table({"prompt": ["cat"] * 100, "note": nested}),
    }[column]
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", store_schema=False)
    data = (tmp_path / "bomb.parquet").read_bytes()
    assert len(data) < 20_000
    added_mib, valid, invalid = read_in_subprocess(write(tmp_path / f"m.parquet{gz_suffix}", data))
    assert added_mib < 150
    assert (valid, invalid) == ((0, table.num_rows) if column == "prompt" else (table.num_rows, 0))


def test_parquet_file_with_huge_prompts_is_rejected(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x" * 2_000_000] * 40})
    pq.write_table(table, tmp_path / "m.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ManifestError, match=r"row group 0: 80,.* bytes in 40 rows is too much"):
        read_all_rows(tmp_path / "m.parquet")


def test_unusual_parquet_types_become_text(tmp_path: Path) -> None:
    columns = {
        "large": pa.array(["a"], pa.large_string()),
        "view": pa.array(["a"], pa.string_view()),
        "fixed": pa.array([b"ab"], pa.binary(2)),
        "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        "bits": pa.array([b"\0\1"], pa.binary()),
        "void": pa.nulls(1),
        "prices": pa.array([[Decimal(1)]], pa.list_(pa.decimal128(3, 2))),
    }
    pq.write_table(pa.table({"prompt": ["cat"], **columns}), tmp_path / "m.parquet")
    (row,) = read_all_rows(tmp_path / "m.parquet")
    assert all(isinstance(value, str) for value in row.extra.values()), row


def test_invalid_utf_8_in_parquet_invalidates_only_its_row(tmp_path: Path) -> None:
    array = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"cat"]).buffers())
    pq.write_table(pa.table({"prompt": array}), tmp_path / "m.parquet")
    invalid, cat = read_all_rows(tmp_path / "m.parquet")
    assert "not UTF-8" in get_reason(invalid)
    assert cat.prompt == "cat"


STARTS = st.sampled_from([b"", b"prompt,seed\n", b"prompt\tseed\n", b'{"prompt": "cat"}\n', b'{"prompt":'])


@given(st.sampled_from(FORMATS), STARTS, st.binary(max_size=200) | st.text(max_size=60).map(str.encode), st.booleans())
@example(".jsonl", b"", b'{"prompt": "a", "steps": {"a": 1}}', True)
@examples(100)
def test_any_bytes_yield_rows_or_a_manifest_error(suffix: str, start: bytes, rest: bytes, is_compressed: bool) -> None:
    data = gzip.compress(start + rest) if is_compressed and suffix.endswith(".gz") else start + rest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        path.write_bytes(data)
        with suppress(ManifestError):
            rows = read_all_rows(path)
            assert rows
            assert all(isinstance(row, Row | InvalidRow) for row in rows)


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.gz"])
def test_truncated_parquet_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    data = encode(ROWS, ".parquet")
    for length in range(0, len(data), 97):
        with pytest.raises(ManifestError, match="not a readable Parquet file"):
            read_all_rows(write(tmp_path / f"m{suffix}", data[:length]))


# The job folder named after the manifest


@pytest.mark.parametrize("name", ["fruit.csv", "fruit.csv.gz", "fruit.TSV.GZ", "fruit.parquet", "fruit.txt"])
def test_job_folder_is_named_after_the_manifest(name: str) -> None:
    assert default_job_folder(Path("somewhere") / name) == Path("outputs/fruit")


@pytest.mark.parametrize("name", ["..csv", "...csv.gz", "-x.csv", "..gz", "."])
def test_names_that_cannot_be_a_folder(name: str) -> None:
    with pytest.raises(UsageError, match="name one with -o"):
        default_job_folder(Path(name))
