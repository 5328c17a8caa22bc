"""Pictures and tables in a job folder may come from anybody, and so may a picture whose settings are asked for."""

import csv
import io
import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from tests.security.conftest import ESCAPES, is_harmless, submit
from tests.support.files import snapshot
from tests.support.jobs import check_whole, draw, read_results
from tests.support.program import Capture, call
from tinysd_batch.export.table import export_table
from tinysd_batch.images import FileFormat, encode_image
from tinysd_batch.report.contact_sheet import write_contact_sheet
from tinysd_batch.storage.atomic import publish

pytestmark = pytest.mark.timeout(60)


# Pictures


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
    """Whether the job's one picture is the model's now."""
    (row,) = read_results(here / "outputs" / "m")
    return is_the_models(here, row)


def is_the_models(here: Path, row: dict[str, Any]) -> bool:
    """Whether a picture is the model's, and not the red one that was put there."""
    with Image.open(here / "outputs" / "m" / row["file_name"]) as image:
        assert (image.format, image.size) == ("PNG", (16, 16))
        return row["worker"] == "inline" and image.getpixel((0, 0)) != (255, 0, 0)


def test_a_picture_with_a_whole_record_is_adopted(here: Path, capfd: Capture, entries: dict[str, Any]) -> None:
    """Else what follows would prove nothing."""
    there = adopt(here, capfd, entries)
    assert not was_drawn(here)
    (path,) = (here / "outputs" / "m").rglob("seed_*.png")
    assert path.read_bytes() == there


RECORDS: list[object] = [
    "text", [], 3, {"n_tokens": "2"}, {"n_tokens": True}, {"n_tokens": 2**40}, {"n_tokens": -(2**40)},
    {"peak_memory_bytes": 2**80}, {"peak_memory_bytes": 1.5}, {"text_s": float("nan")}, {"text_s": float("inf")},
    {"text_s": "1"}, {"text_s": False}, {"decode_s": -(10**400)}, {"truncated": ["a"]}, {"truncated": "\ud800"},
    {"negative_truncated": {}}, {"degraded": [[]]}, {"degraded": "split"}, {"degraded": ["\ud800"]},
    {"degraded": [ESCAPES]}, {"device_name": None}, {"device_name": ESCAPES}, {"device_name": "\ud800"},
    {"precision": 16}, {"node": "x"}, {"text_s": 1.0}, {"index": 7}, {"status": "failed"}, {"file_name": "../x"},
]  # fmt: skip


def test_records_that_the_table_cannot_hold_are_drawn_anew(here: Path, capfd: Capture, tiny_model: Path) -> None:
    """One job whose images lie there already, each with another faulty record, but the last, which is adopted."""
    records = [*RECORDS, {}]
    (here / "m.csv").write_text(f"prompt,n_iter\ncat,{len(records)}\n")
    draw(here / "m.csv", here / "plain", tiny_model, seed=5)
    images = here / "outputs" / "m" / "images" / "00000"
    images.mkdir(parents=True)
    for number, record in enumerate(records):
        name = f"seed_{5 + number}_{number + 1:05d}.png"
        with Image.open(here / "plain" / "images" / "00000" / name) as image:
            ours = json.loads(image.text["tinysd"])  # type: ignore[attr-defined]
        ours["made"] = ours["made"] | record if isinstance(record, dict) else record
        (images / name).write_bytes(picture(tinysd=json.dumps(ours)))
    code, stdout, stderr = submit(capfd)
    assert code == 0, stderr
    assert "Traceback" not in stdout + stderr
    rows = check_whole(here / "outputs" / "m", len(records))
    adopted = [record for record, row in zip(records, rows, strict=True) if not is_the_models(here, row)]
    assert adopted == [{}]


MEASURED = {"text_s": 0.1, "denoise_s": 1, "decode_s": 0.2, "peak_memory_bytes": 3}


def test_an_image_of_version_0_1_is_adopted_with_its_measurements(
    here: Path, capfd: Capture, entries: dict[str, Any]
) -> None:
    adopt(here, capfd, entries | {"schema": 1}, made=MEASURED)
    assert not was_drawn(here)
    (row,) = read_results(here / "outputs" / "m")
    assert {name: row[name] for name in MEASURED} == MEASURED


@pytest.mark.parametrize("schema", [None, 0, 3, 1, "2", True, 2.0, [2], 10**30])
def test_an_image_with_another_schema_is_generated_again(
    here: Path, capfd: Capture, entries: dict[str, Any], schema: object
) -> None:
    adopt(here, capfd, entries | {"schema": schema})
    assert was_drawn(here)


@pytest.mark.parametrize("bad", [{"peak_memory_bytes": 2**80}, {"peak_memory_bytes": 1.5}, {"text_s": float("nan")},
                                 {"text_s": float("inf")}, {"text_s": "1"}, {"text_s": False}], ids=str)  # fmt: skip
def test_measurements_that_the_table_cannot_hold_are_not_adopted(
    here: Path, capfd: Capture, entries: dict[str, Any], bad: dict[str, object]
) -> None:
    adopt(here, capfd, entries | {"schema": 1}, made=MEASURED | bad)
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


@pytest.mark.parametrize("n_samples", [1, 3])
def test_a_folder_in_the_place_of_an_image_costs_that_image_and_stays(
    here: Path, capfd: Capture, n_samples: int
) -> None:
    (here / "m.csv").write_text("prompt\ncat\ndog\n")
    there = here / "outputs" / "m" / "images" / "00000" / "seed_5_00001.png"
    there.mkdir(parents=True)
    (there / "precious").touch()
    code, stdout, stderr = submit(capfd, "m.csv", "--n_samples", n_samples)
    assert (code, stderr) == (3, "")
    assert "1 failed" in stdout
    assert (there / "precious").exists()
    first, *others = read_results(here / "outputs" / "m")
    assert (first["status"], first["error_class"], first["file_name"]) == ("failed", "refused", None)
    told = f"{there}: a folder is in the image's place; move it away, then submit with --retry-failed"
    assert first["error_message"] == told
    assert [(row["status"], row["degraded"]) for row in others] == [("ok", [])] * (2 * n_samples - 1)
    shutil.rmtree(there)
    assert submit(capfd, "m.csv", "--n_samples", n_samples, "--retry-failed")[0] == 0
    check_whole(here / "outputs" / "m", 2 * n_samples)


def test_a_huge_file_in_the_way_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**40)
    publish(b"picture", tmp_path / "x", tmp_path / "tmp", lambda found: found != b"")
    assert (tmp_path / "x").read_bytes() == b"picture"


def test_what_a_picture_says_of_itself_is_no_formula_either(
    here: Path, capfd: Capture, entries: dict[str, Any]
) -> None:
    adopt(here, capfd, entries, made={"degraded": ["=1+1"], "truncated": "=2"})
    export_table(here / "outputs" / "m", here / "x.csv")
    with (here / "x.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["degraded"], row["truncated"]) == ("'=1+1", "'=2")


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
