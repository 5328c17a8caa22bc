"""Manifests, models, pictures and job folders may come from anybody: none may do more than cost itself.

What broken files of each kind are told is in `test_bad_inputs.py`; bombs in manifests are in `job/test_formats.py`.
"""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from tests.job.test_driver import draw
from tests.test_bad_inputs import Capture, Change, call, check_refused, instead, put, set_json, snapshot
from tests.tools import check_whole, command, environment, read_results
from tinysd_batch.images import FileFormat, encode_image
from tinysd_batch.report.contact_sheet import write_contact_sheet
from tinysd_batch.report.export import export_table
from tinysd_batch.storage import publish

pytestmark = pytest.mark.timeout(60)
ESCAPES = "\x1b[31m\x1b]0;evil\x07\x9b2J\r\b\u202e\u2066\x85"


def is_harmless(text: str) -> bool:
    """No control characters but line ends, nothing that turns the direction of text."""
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A folder to work in, a model beside it, and outside of it what nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    (tmp_path / "outside" / ".tmp-not-ours").write_text("precious")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "m.csv").write_text("prompt\ncat\n")
    (tmp_path / "model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def submit(capture: Capture, *more: object) -> tuple[int, str, str]:
    return call(capture, "submit", *(more or ["m.csv"]), "--inline", "--model", "../model", "--seed", 5)


# Names and places


@pytest.mark.parametrize(
    "name", ["../x.csv", "./a/../../x.csv", "new\nline.csv", f"{ESCAPES}.csv", " .csv", "a\\b.csv"]
)
def test_a_manifests_name_leads_nowhere_else(here: Path, capfd: Capture, name: str) -> None:
    (here / "a").mkdir()
    (here / name).write_text("prompt\ncat\n")
    outside = snapshot(here.parent / "outside")
    code, stdout, stderr = submit(capfd, name)
    assert code == 0, stderr
    assert is_harmless(stdout + stderr)
    assert [folder.name for folder in (here / "outputs").iterdir()] == [Path(name).stem]
    assert sorted(path.name for path in here.parent.iterdir() if path.name != "x.csv") == ["here", "model", "outside"]
    assert snapshot(here.parent / "outside") == outside


@pytest.mark.parametrize("name", ["...toml", "..toml", "-x.toml"])
def test_a_job_files_name_leads_nowhere_else(here: Path, capfd: Capture, name: str) -> None:
    (here / name).write_text('manifest = "m.csv"\n')
    check_refused(capfd, here, ["submit", "--", name], 2, "no folder can be named after it")


HOSTILE_CELLS = [
    "../../../outside/precious",
    "/etc/passwd",
    "a\nb",
    "-rf",
    "..",
    "{0.__class__}",
    "%s",
    "$(id)",
    ESCAPES,
]


@pytest.mark.parametrize("cell", HOSTILE_CELLS)
def test_prompts_and_ids_are_no_names(here: Path, capfd: Capture, cell: str) -> None:
    with (here / "m.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "id", cell], [cell, cell, cell]])
    code, stdout, stderr = submit(capfd, "m.csv", "--verbose", "--prompt-syntax", "none")
    assert code == 0, stderr
    assert is_harmless(stdout + stderr)
    (row,) = check_whole(here / "outputs" / "m", 1)
    assert (row["id"], row["prompt"], row["file_name"]) == (cell, cell, "images/00000/seed_5_00001.png")


# Links


@pytest.mark.parametrize("place", ["images", "_tinysd", "_tinysd/tmp", "_tinysd/journal", "results"])
def test_folders_that_are_links_are_refused(here: Path, capfd: Capture, place: str) -> None:
    assert submit(capfd)[0] == 0
    job = here / "outputs" / "m"
    instead(place, lambda path: path.symlink_to(here.parent / "outside"))(job)
    check_refused(capfd, here.parent, ["submit", "m.csv", "--inline", "--model", "../model"], 2, "is a symbolic link")


@pytest.mark.parametrize(
    ("place", "code"),
    [("images/00000", 5), ("_tinysd/lock", 5), ("_tinysd/stop", 0), ("contact_sheet.png", 0),
     ("images/00000/seed_5_00001.png", 0)],
)  # fmt: skip
def test_nothing_is_written_through_a_link(here: Path, capfd: Capture, place: str, code: int) -> None:
    (here / "outputs" / "m" / place).parent.mkdir(parents=True)
    target = here.parent / "outside" / ("" if place == "images/00000" else "precious")
    (here / "outputs" / "m" / place).symlink_to(target)
    outside = snapshot(here.parent / "outside")
    assert submit(capfd)[0] == code
    assert snapshot(here.parent / "outside") == outside
    if code == 0:
        check_whole(here / "outputs" / "m", 1)


@pytest.mark.parametrize("place", ["job.json", "results.parquet"])
def test_files_of_a_job_may_be_links_that_are_replaced(here: Path, capfd: Capture, place: str) -> None:
    (here / "m.csv").write_text("prompt\ncat\ndog\n")
    assert submit(capfd, "m.csv", "--limit", 1)[0] == 0
    job = here / "outputs" / "m"
    shutil.move(job / place, here.parent / "outside" / place)
    (job / place).symlink_to(here.parent / "outside" / place)
    outside = snapshot(here.parent / "outside")
    assert submit(capfd)[0] == 0
    assert snapshot(here.parent / "outside") == outside
    assert not (job / place).is_symlink()
    check_whole(job, 2)


def test_a_job_folder_may_be_a_link_to_a_larger_disk(here: Path, capfd: Capture) -> None:
    (here.parent / "large").mkdir()
    (here / "outputs").mkdir()
    (here / "outputs" / "m").symlink_to(here.parent / "large")
    assert submit(capfd)[0] == 0
    assert submit(capfd)[0] == 0
    check_whole(here.parent / "large", 1)
    assert (here / "outputs" / "m").is_symlink()
    assert call(capfd, "status", "outputs/m")[0] == 0


def test_txt2img_follows_no_link_to_a_picture(here: Path, capfd: Capture) -> None:
    (here / "out").mkdir()
    for name in ("seed_5_00001.png", "grid_00002.png"):
        (here / "out" / name).symlink_to(here.parent / "outside" / "precious")
    (here / "out" / f"seed_1_{'9' * 200}.png").touch()  # no number to go on from
    outside = snapshot(here.parent / "outside")
    code, _, stderr = call(capfd, "txt2img", "cat", "--model", "../model", "--seed", 5, "--n_samples", 2, "-o", "out")
    assert code == 0, stderr
    assert snapshot(here.parent / "outside") == outside
    assert not (here / "out" / "grid_00002.png").is_symlink()


# Spreadsheets


def test_exported_text_is_no_formula(here: Path, capfd: Capture) -> None:
    formulas = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", '=HYPERLINK("http://x","y")']  # noqa: RUF001
    pq.write_table(
        pa.table({"prompt": formulas, "id": formulas, "=cmd|' /C calc'!A0": formulas, "loss": [-1.5] * len(formulas)}),
        here / "m.parquet",
    )
    code, _, stderr = submit(capfd, "m.parquet", "--prompt-syntax", "none", "--n_iter", 1)
    assert code == 0, stderr
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        assert export_table(here / "outputs" / "m", here / name) == len(formulas)
        with (here / name).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, delimiter=separator)
        assert header[-2:] == ["'=cmd|' /C calc'!A0", "loss"]
        for formula, row in zip(formulas, rows, strict=True):
            cells = dict(zip(header, row, strict=True))
            assert [cells[column] for column in ("prompt", "id", header[-2])] == [f"'{formula}"] * 3
            assert cells["loss"] == "-1.5"
    assert export_table(here / "outputs" / "m", here / "x.jsonl") == len(formulas)
    lines = (here / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == formulas


def test_what_a_picture_says_of_itself_is_no_formula_either(
    here: Path, capfd: Capture, entries: dict[str, Any]
) -> None:
    adopt(here, capfd, entries, made={"degraded": ["=1+1"], "truncated": "=2"})
    export_table(here / "outputs" / "m", here / "x.csv")
    with (here / "x.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["degraded"], row["truncated"]) == ("'=1+1", "'=2")


# Terminals


def test_no_command_passes_escapes_on(here: Path, capfd: Capture) -> None:
    name = f"m{ESCAPES}.jsonl"
    good = {"prompt": f"cat {ESCAPES} {'dog ' * 40}", "id": ESCAPES, f"note{ESCAPES}": ESCAPES}
    weighted = {"prompt": f"cat{ESCAPES}:0.5 dog:0.5"}
    bad = {"prompt": f"cat{ESCAPES}", "seed": ESCAPES, "sampler": ESCAPES}
    (here / name).write_text("".join(json.dumps(row) + "\n" for row in (good, weighted, bad)))
    shutil.copytree(here.parent / "model", here / f"model{ESCAPES}")
    set_json("tinysd.json", name=f"model{ESCAPES}")(here / f"model{ESCAPES}")
    options = ["--model", f"model{ESCAPES}"]
    job = f"job{ESCAPES}"
    runs = [
        call(capfd, "plan", name, *options, "--verbose"),
        call(capfd, "plan", name, *options, "--json"),
        call(capfd, "submit", name, *options, "--inline", "--verbose", "-o", job),
        call(capfd, "submit", name, *options, "--inline", "-o", job),
        call(capfd, "submit", name, *options, "--inline", "-o", job, "--steps", 9),
        call(capfd, "status", job),
        call(capfd, "export", job, f"x{ESCAPES}.csv"),
        call(capfd, "txt2img", "--from-file", name, *options, "--n_samples", 2, "-o", f"out{ESCAPES}"),
        call(capfd, "txt2img", f"cat {ESCAPES}", *options, "-o", f"out{ESCAPES}"),
        call(capfd, "status", "--image", next((here / job).rglob("seed_*.png"))),
    ]
    for number, (code, stdout, stderr) in enumerate(runs):
        assert code in ((2,) if number == 4 else (0, 3)), (number, stderr)
        assert is_harmless(stdout + stderr), number


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit", f"{ESCAPES}.csv"),
        ("submit", f"{ESCAPES}"),
        ("submit", "m.csv", "--model", ESCAPES),
        ("submit", "m.csv", "--sampler", ESCAPES),
        ("submit", "m.csv", "--preset", ESCAPES),
        ("submit", "m.csv", "--preset", "keys.toml"),
        ("submit", "m.csv", "-o", f"{ESCAPES}{'x' * 300}"),
        ("submit", "header.csv", "--strict"),
        ("txt2img", "--negative-prompt", f"{ESCAPES}:0 b:0 ", "cat"),
        ("status", ESCAPES),
        ("status", "--image", ESCAPES),
        ("export", ESCAPES, "x.csv"),
    ],
    ids=lambda words: " ".join(words).encode("unicode_escape").decode()[:40],
)
def test_error_messages_pass_no_escapes_on(here: Path, capfd: Capture, arguments: tuple[str, ...]) -> None:
    (here / "keys.toml").write_text(f"{json.dumps(ESCAPES)} = {json.dumps(ESCAPES)}\n")
    (here / "header.csv").write_bytes(f'"prompt","{ESCAPES}"\ncat,x\n'.encode())
    code, stdout, stderr = call(capfd, *arguments)
    assert code in (2, 5)
    assert stderr.startswith("tinysd-batch: ")
    assert is_harmless(stdout + stderr)


@pytest.mark.slow
def test_a_terminal_that_cannot_show_a_prompt_ends_no_job(here: Path) -> None:
    (here / "m.csv").write_text("prompt\ncat \N{SNOWMAN}\n", encoding="utf-8")
    name = os.fsdecode(b"m\xff.csv")  # no UTF-8
    (here / "m.csv").rename(here / name)
    done = subprocess.run(
        [*command("submit"), name, "--inline", "--verbose", "--model", "../model"],
        env=environment(PYTHONIOENCODING="ascii", LC_ALL="C"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cat \\u2603" in done.stdout


def picture(size: int = 16, /, **entries: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in entries.items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "written",
    [
        {"tinysd": json.dumps({"prompt": ESCAPES, ESCAPES: [ESCAPES], "made": {ESCAPES: {"a": ESCAPES}}})},
        {"tinysd": json.dumps({"prompt": "cat", "made": "x" * 100_000})},
        {"tinysd": '{"prompt": "cat", "deep": ' + "[" * 700 + "]" * 700 + "}"},
        {"parameters": f"cat {ESCAPES}\nSteps: {ESCAPES}"},
    ],
)
def test_what_a_picture_says_is_shown_harmlessly(here: Path, capfd: Capture, written: dict[str, str]) -> None:
    (here / "x.png").write_bytes(picture(16, **written))
    code, stdout, stderr = call(capfd, "status", "--image", "x.png")
    assert (code, stderr) == (0, "")
    assert "cat" in stdout or "[31m" in stdout
    assert is_harmless(stdout)
    assert len(stdout) < 5000


# Pictures in the way of a job's own


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """What a job with this manifest and seed writes into its picture."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "m.csv").write_text("prompt\ncat\n")
    draw(folder / "m.csv", folder, tiny_model, seed=5)
    with Image.open(next(folder.rglob("seed_*.png"))) as image:
        found: dict[str, Any] = json.loads(image.text["tinysd"])  # type: ignore[attr-defined]
    return found


def adopt(
    here: Path, capture: Capture, entries: dict[str, Any], made: object = None,
    make: Callable[[Path, dict[str, Any]], object] | None = None,
) -> bytes:  # fmt: skip
    """Run a job in whose picture's place something lies already; return what it was."""
    ours = dict(entries)
    if made is not None:
        ours["made"] = ours["made"] | made if isinstance(made, dict) else made
    path = here / "outputs" / "m" / "images" / "00000" / "seed_5_00001.png"
    path.parent.mkdir(parents=True)
    if make is None:
        path.write_bytes(picture(tinysd=json.dumps(ours)))
    else:
        make(path, ours)
    there = path.read_bytes() if path.is_file() and path.stat().st_size < 10**6 else b""
    code, stdout, stderr = submit(capture)
    assert code == 0, stderr
    assert "Traceback" not in stdout + stderr
    check_whole(here / "outputs" / "m", 1)
    return there


def was_drawn(here: Path) -> bool:
    """Whether the picture is the model's now, and not the red one that was put there."""
    (row,) = read_results(here / "outputs" / "m")
    with Image.open(here / "outputs" / "m" / row["file_name"]) as image:
        assert (image.format, image.size) == ("PNG", (16, 16))
        return row["worker"] == "inline" and image.getpixel((0, 0)) != (255, 0, 0)


def test_a_picture_with_a_whole_record_is_adopted(here: Path, capfd: Capture, entries: dict[str, Any]) -> None:
    """Else what follows would prove nothing."""
    there = adopt(here, capfd, entries)
    assert not was_drawn(here)
    (path,) = (here / "outputs" / "m").rglob("seed_*.png")
    assert path.read_bytes() == there


@pytest.mark.parametrize(
    "made",
    [
        "text", [], 3, {"n_tokens": "2"}, {"n_tokens": True}, {"n_tokens": 2**40}, {"n_tokens": -(2**40)},
        {"peak_memory_bytes": 2**80}, {"peak_memory_bytes": 1.5}, {"text_s": float("nan")}, {"text_s": float("inf")},
        {"text_s": "1"}, {"text_s": False}, {"decode_s": -(10**400)}, {"truncated": ["a"]}, {"truncated": "\ud800"},
        {"negative_truncated": {}}, {"degraded": [[]]}, {"degraded": "split"}, {"degraded": ["\ud800"]},
        {"degraded": [ESCAPES]}, {"device_name": None}, {"device_name": ESCAPES}, {"device_name": "\ud800"},
        {"precision": 16}, {"node": "x"}, {"index": 7}, {"status": "failed"}, {"file_name": "../x"},
    ],
    ids=str,
)  # fmt: skip
def test_records_that_the_table_cannot_hold_are_drawn_anew(
    here: Path, capfd: Capture, entries: dict[str, Any], made: object
) -> None:
    adopt(here, capfd, entries, made)
    assert was_drawn(here)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that says it is so large, whatever is in it."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")])


def with_entries(ours: dict[str, Any], kind: str, image: Image.Image | None = None) -> bytes:
    return encode_image(image or Image.new("RGB", (16, 16), "red"), FileFormat(kind), "", ours)


@cache
def text_bomb(kind: bytes) -> bytes:
    packed = zlib.compress(b" " * 50_000_000)
    return chunk(kind, b"tinysd\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + packed)


def write_frames(path: Path, ours: dict[str, Any], kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")] * 20
    info = PngImagePlugin.PngInfo()
    info.add_itxt("tinysd", "[")
    options = {"pnginfo": info} if kind == "PNG" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], **options)


PIXELS = chunk(b"IDAT", zlib.compress(b"\0" * 49 * 16))

IN_THE_WAY: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "nothing in it": lambda path, _: path.touch(),
    "text": lambda path, _: path.write_text("GIF89a"),
    "half a picture": lambda path, ours: path.write_bytes(picture(tinysd=json.dumps(ours))[:-30]),
    "half the pixels": lambda path, ours: path.write_bytes(
        png(16, 16, chunk(b"iTXt", b"tinysd\0\0\0\0\0" + json.dumps(ours).encode()), PIXELS[:-20])
    ),
    "huge": lambda path, _: path.write_bytes(png(60_000, 60_000, PIXELS)),
    "huge, with the right entries": lambda path, ours: path.write_bytes(
        png(13_000, 13_000, chunk(b"iTXt", b"tinysd\0\0\0\0\0" + json.dumps(ours).encode()), PIXELS)
    ),
    "larger than the table says": lambda path, ours: path.write_bytes(picture(32, tinysd=json.dumps(ours))),
    "a zTXt bomb": lambda path, _: path.write_bytes(png(16, 16, text_bomb(b"zTXt"), PIXELS)),
    "an iTXt bomb": lambda path, _: path.write_bytes(png(16, 16, text_bomb(b"iTXt"), PIXELS)),
    "thousands of entries": lambda path, _: path.write_bytes(
        png(16, 16, *[chunk(b"tEXt", b"tinysd%d\0x" % number) for number in range(50_000)], PIXELS)
    ),
    "deep": lambda path, _: path.write_bytes(picture(tinysd="[" * 100_000)),
    "a huge number": lambda path, _: path.write_bytes(picture(tinysd="9" * 100_000)),
    "no object": lambda path, _: path.write_bytes(picture(tinysd="[1]")),
    "another image's": lambda path, ours: path.write_bytes(picture(tinysd=json.dumps(ours | {"image_id": [1]}))),
    "a JPEG": lambda path, ours: path.write_bytes(with_entries(ours, "jpg")),
    "a WebP": lambda path, ours: path.write_bytes(with_entries(ours, "webp")),
    "a BMP": lambda path, _: Image.new("RGB", (16, 16)).save(path, "BMP"),
    "PostScript": lambda path, _: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(x) run\n"),
    "an animated PNG": lambda path, ours: write_frames(path, ours, "PNG"),
    "an animated WebP": lambda path, ours: write_frames(path, ours, "WEBP"),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a device": lambda path, _: path.symlink_to("/dev/zero"),
    "a sparse file": lambda path, _: path.open("wb").truncate(2**40),
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_files_in_the_way_of_a_picture_are_replaced(
    here: Path, capfd: Capture, entries: dict[str, Any], kind: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    adopt(here, capfd, entries, make=IN_THE_WAY[kind])
    assert was_drawn(here)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_a_huge_webp_costs_no_memory(here: Path, capfd: Capture, entries: dict[str, Any]) -> None:
    """16383 x 16383, which as pixels are a gigabyte."""
    size = (16382).to_bytes(3, "little")
    body = b"WEBPVP8X" + (10).to_bytes(4, "little") + b"\0\0\0\0" + size + size
    data = b"RIFF" + len(body).to_bytes(4, "little") + body
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    adopt(here, capfd, entries, make=lambda path, _: path.write_bytes(data))
    assert was_drawn(here)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_folder_in_the_way_of_a_picture_stops_the_job_and_stays(here: Path, capfd: Capture) -> None:
    there = here / "outputs" / "m" / "images" / "00000" / "seed_5_00001.png"
    there.mkdir(parents=True)
    (there / "precious").touch()
    code, _, stderr = submit(capfd)
    assert code == 5
    assert stderr.startswith("tinysd-batch: ")
    assert "seed_5_00001.png: Is a directory" in stderr
    assert (there / "precious").exists()
    shutil.rmtree(there)
    assert submit(capfd)[0] == 0
    check_whole(here / "outputs" / "m", 1)


def test_a_huge_file_in_the_way_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**40)
    publish(b"picture", tmp_path / "x", tmp_path / "tmp", lambda found: found != b"")
    assert (tmp_path / "x").read_bytes() == b"picture"


# Job folders


def change_table(job: Path, **values: object) -> None:
    """Write other values into the results, in their columns' types."""
    table = pq.read_table(job / "results.parquet")
    rows = [row | values for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), job / "results.parquet")


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"index": -5}, 0), ({"index": 2**62}, 0), ({"status": "x" * 1000}, 3), ({"status": ESCAPES}, 3),
        ({"status": None}, 5), ({"row": None}, 5), ({"row": -1}, 0), ({"prompt": None}, 0), ({"worker": ESCAPES}, 0),
        ({"device_name": ESCAPES}, 0), ({"error_message": ESCAPES, "status": "failed"}, 3),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
@pytest.mark.slow
def test_hostile_rows(here: Path, capfd: Capture, values: dict[str, object], code: int) -> None:
    (here / "m.csv").write_text("prompt\ncat\ndog\n")
    assert submit(capfd, "m.csv", "--limit", 1)[0] == 0
    job = here / "outputs" / "m"
    change_table(job, **values)
    for run in (submit(capfd), call(capfd, "status", "outputs/m"), call(capfd, "export", "outputs/m", "x.csv")):
        assert run[0] in (code, 0), run
        assert is_harmless(run[1] + run[2])
    if code == 0:
        drawn = {row["prompt"] for row in read_results(job) if row["status"] == "ok"}
        assert {"dog"} <= drawn


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside/x.png", "images/../../../../outside/x.png", "", None])
def test_the_contact_sheet_shows_only_the_jobs_own(here: Path, capfd: Capture, name: str | None) -> None:
    assert submit(capfd)[0] == 0
    Image.new("RGB", (16, 16)).save(here.parent / "outside" / "x.png")
    change_table(here / "outputs" / "m", file_name=name)
    assert write_contact_sheet(here / "outputs" / "m") is None


@pytest.mark.parametrize("kind", ["huge", "huge, with the right entries", "a zTXt bomb", "PostScript", "a pipe"])
def test_the_contact_sheet_leaves_hostile_pictures_out(here: Path, capfd: Capture, kind: str) -> None:
    assert submit(capfd)[0] == 0
    (path,) = (here / "outputs" / "m").rglob("seed_*.png")
    path.unlink()
    IN_THE_WAY[kind](path, {})
    assert submit(capfd)[0] == 0


@pytest.mark.parametrize("name", ["x.parquet", "-1.parquet", "9" * 200 + ".parquet", "٣٣٣٣٣٣٣٣.parquet"])
@pytest.mark.slow
def test_strange_names_in_the_journal_are_left_alone(here: Path, capfd: Capture, name: str) -> None:
    (here / "m.csv").write_text("prompt\ncat\ndog\n")
    assert submit(capfd, "m.csv", "--limit", 1)[0] == 0
    strange = here / "outputs" / "m" / "_tinysd" / "journal" / name
    strange.write_bytes(b"x")
    assert submit(capfd)[0] == 0
    assert strange.read_bytes() == b"x"
    assert [row["prompt"] for row in read_results(here / "outputs" / "m")] == ["cat", "dog"]


@pytest.mark.parametrize("covers", [b"3", b"[3]", b'["x"]', b'["../../../job"]', b"{", b"[" * 100_000])
@pytest.mark.slow
def test_a_table_that_says_it_covers_strange_parts(here: Path, capfd: Capture, covers: bytes) -> None:
    (here / "m.csv").write_text("prompt\ncat\ndog\n")
    assert submit(capfd, "m.csv", "--limit", 1)[0] == 0
    path = here / "outputs" / "m" / "results.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"tinysd_covers": covers}), path)
    before = snapshot(here / "outputs" / "m")
    code, _, stderr = submit(capfd)
    assert code == (0 if covers.startswith(b'["') else 5), stderr
    if code:
        assert "results.parquet: cannot be read" in stderr
        assert snapshot(here / "outputs" / "m") == before


# Models

MARKER = "executed"
CODE = f"import pathlib; pathlib.Path({MARKER!r}).touch()"


def plant_code(model: Path) -> None:
    """Every way known to have a model folder run code: pickles, modules, and configurations that name them."""
    pickle = b"cpathlib\nPath\n(S'" + MARKER.encode() + b"'\ntR(dS'x'\nS'y'\nsb."
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        for name in (f"{stem}.bin", f"{stem}.ckpt", "pytorch_model.bin", f"{stem}.pt"):
            (model / part / name).write_bytes(pickle)
    for folder in (model, *(path for path in model.iterdir() if path.is_dir())):
        for name in ("modeling.py", "pipeline.py", "__init__.py", "conftest.py", "kernel.py"):
            (folder / name).write_text(CODE)
    classes = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config", "AutoTokenizer": ["modeling.T", None]}
    strange = {"auto_map": classes, "_class_name": "os", "custom_pipeline": "pipeline", "trust_remote_code": True}
    set_json("unet/config.json", **strange)(model)
    set_json("vae/config.json", **strange)(model)
    set_json(
        "text_encoder/config.json", **strange, _attn_implementation="somebody/kernel", attn_implementation="a/b",
        architectures=["modeling.Model"], quantization_config={"quant_method": "bitsandbytes"},
    )(model)  # fmt: skip
    set_json("tokenizer/tokenizer_config.json", **strange, chat_template="{{ 1.__class__.__mro__ }}")(model)
    set_json("scheduler/scheduler_config.json", **strange)(model)
    put("model_index.json", json.dumps({"_class_name": ["pipeline", "P"], "unet": ["os", "system"]}).encode())(model)


@pytest.mark.slow
def test_nothing_of_a_model_folder_is_executed(here: Path, tiny_model: Path, tmp_path: Path) -> None:
    """In a process of its own, that imports afresh, and that opens no connection."""
    shutil.copytree(tiny_model, here / "planted")
    plant_code(here / "planted")
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = refuse\n"
        "import tinysd_batch.cli as cli\n"
        "sys.argv = ['x', 'submit', 'm.csv', '--inline', '--model', 'planted', '--seed', '5', '-o', 'job']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    print('code', end.code)\n"
        "print('planted', [m for m in sys.modules.values() if 'planted' in str(getattr(m, '__file__', ''))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "code 0" in done.stdout, done.stdout + done.stderr
    assert "planted []" in done.stdout
    assert not list(tmp_path.rglob(MARKER))
    draw(here / "m.csv", here / "plain", tiny_model, seed=5)
    drawn = [Image.open(next((here / job).rglob("seed_*.png"))) for job in ("job", "plain")]
    assert drawn[0].tobytes() == drawn[1].tobytes()


@pytest.mark.parametrize(
    "change",
    [
        set_json("unet/config.json", in_channels=4, cross_attention_dim=10**9),
        set_json("unet/config.json", block_out_channels=[10**6, 10**6]),
        set_json("vae/config.json", block_out_channels=[10**6, 10**6]),
        set_json("text_encoder/config.json", vocab_size=10**9, hidden_size=10**6),
        set_json("text_encoder/config.json", max_position_embeddings=10_000),
        set_json("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        put("unet/diffusion_pytorch_model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
        put(
            "vae/diffusion_pytorch_model.safetensors",
            (lambda head: len(head).to_bytes(8, "little") + head)(
                b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
            ),
        ),
        put("tinysd.json", json.dumps({"name": "x" * 10_000_000}).encode()),
    ],
)
def test_a_model_that_asks_for_much_gets_nothing(here: Path, capfd: Capture, tiny_model: Path, change: Change) -> None:
    shutil.copytree(tiny_model, here / "greedy")
    change(here / "greedy")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, stdout, stderr = call(capfd, "submit", "m.csv", "--inline", "--model", "greedy")
    assert code in (0, 2), stderr
    assert len(stdout + stderr) < 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
    assert (here / "outputs").exists() == (code == 0)
