"""Jobs and a model of version 0.1.0: this version reads, exports and finishes them, and changes none of their images.

`tests/fixtures/make_0_1_0.py` created them. `expected.json` has the rows of each job after 0.1.0 itself finished it.
"""

import functools
import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.paths import FIXTURES
from tests.support.program import run_here
from tinysd_batch.job.plan.batches import plan_images
from tinysd_batch.job.plan.image_id import compute_image_id
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.records import Row
from tinysd_batch.settings.schema import IMAGE_SETTINGS, ImageSettings

MODEL = FIXTURES / "model"
NAMES = sorted(folder.parent.name for folder in FIXTURES.glob("*/expected.json"))
STEPS = {"killed": 120}
LIMITS = {"large": ("--limit", 8), "killed": ("--limit", 6)}  # a few images more than the job has
COMPARED_COLUMNS = ("index", "row", "sample", "prompt", "seed", "image_id", "file_name", "status")

loaded = functools.cache(TinySD.from_pretrained)


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinySD, "from_pretrained", loaded)


def copy_fixture(name: str, folder: Path) -> tuple[Path, Path]:
    """Copy a fixture to a folder where it may change; return its manifest and job folder."""
    shutil.copytree(FIXTURES / name, folder / name)
    (manifest,) = (path for path in (folder / name).iterdir() if path.is_file() and path.name != "expected.json")
    return manifest, folder / name / "job"


def run_command(name: str, manifest: Path, job: Path, *more: object, command: str = "submit") -> CompletedProcess[str]:
    settings = ("--sampler", "ddim", "--steps", STEPS.get(name, 1), "--scale", 1, "--skip_grid", "--model", MODEL)
    only_submit = ("--inline", *LIMITS.get(name, ())) if command == "submit" else ()
    strict = ("--strict",) if name == "jsonl_strict" else ()
    return run_here(command, manifest, "-o", job, *settings, *strict, *only_submit, *more, cwd=job.parent)


def read_table_rows(job: Path) -> list[dict[str, Any]]:
    rows = [row for file in ResultsTable(job).sealed_files() for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["row"], row["index"] or 0))


def read_expected_rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    return rows


def select_compared_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{column: row[column] for column in COMPARED_COLUMNS} for row in rows if row["index"] is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_of_0_1_0_is_resumed_as_it_began(name: str, tmp_path: Path) -> None:
    """Every image keeps the index, seed, id and file name that 0.1.0 gives it; existing files keep their bytes."""
    manifest, job = copy_fixture(name, tmp_path)
    files = {path: path.read_bytes() for path in job.rglob("*.png")}
    rows_before = read_table_rows(job)
    done = run_command(name, manifest, job)
    assert done.returncode in (0, 3), done.stderr
    rows = read_table_rows(job)
    expected = select_compared_columns(read_expected_rows(name))
    expected_by_index = {row["index"]: row for row in expected if row["index"] <= LIMITS.get(name, ("", 99))[1]}
    by_index = {row["index"]: row for row in select_compared_columns(rows)}
    assert {index: row for index, row in by_index.items() if index <= len(expected)} == expected_by_index
    assert all(path.read_bytes() == data for path, data in files.items())
    names = rows_before[0].keys() if rows_before else ()
    kept = [{name: row.get(f"manifest_{name}", row[name]) for name in names} for row in rows]
    assert [row for row in rows_before if row["index"] is not None and row not in kept] == []
    again = run_command(name, manifest, job)
    assert again.returncode == done.returncode, again.stderr
    assert read_table_rows(job) == rows


@pytest.mark.parametrize("name", NAMES)
def test_a_job_of_0_1_0_is_read_planned_and_exported(name: str, tmp_path: Path) -> None:
    manifest, job = copy_fixture(name, tmp_path)
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    images = len({path for path in before if path.suffix == ".png"})
    status = run_here("status", job, cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    # One image of the killed job has no row yet: it is adopted when the job is resumed.
    assert f"ok {images}" in " ".join(status.stdout.split()) or name == "killed"
    planned = run_command(name, manifest, job, "--json", command="plan")
    assert planned.returncode in (0, 3), planned.stderr
    assert json.loads(planned.stdout)["rows"] > 0
    exported = run_here("export", job, tmp_path / "table.jsonl", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = {row["index"]: row["image_id"] for row in read_expected_rows(name)}
    assert lines
    assert all(ids[line["index"]] == line["image_id"] for line in lines if line["index"] is not None)
    after = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    assert after == before


def test_a_column_that_is_a_setting_now_stays_the_manifests_own(tmp_path: Path) -> None:
    """0.1.0 had no clip_skip and copied the column to the results. Rows that are added mean the same by it."""
    manifest, job = copy_fixture("setting_column", tmp_path)
    with manifest.open("a") as file:
        file.write("fox,11,7\n")
    done = run_command("setting_column", manifest, job)
    assert done.returncode == 0, done.stderr
    rows = read_table_rows(job)
    assert [(row["seed"], row["clip_skip"], row["manifest_clip_skip"]) for row in rows] == [
        (7, None, "2"), (6, None, "1"), (9, 1, None), (11, 1, "7"),
    ]  # fmt: skip
    schema = pq.read_schema(job / "results.parquet")
    assert {str(schema.field(name).type) for name in ("clip_skip", "manifest_clip_skip")} == {"int32", "string"}
    again = run_command("setting_column", manifest, job)
    assert again.returncode == 0, again.stderr
    assert read_table_rows(job) == rows


def test_image_ids_are_those_of_0_1_0() -> None:
    golden = json.loads((FIXTURES / "image_ids.json").read_text(encoding="utf-8"))
    for request in golden["requests"]:
        expected = request.pop("image_id")
        params = dict(zip(("width", "height", "steps", "sampler", "eta"), request.pop("params"), strict=True))
        names = request.keys() & IMAGE_SETTINGS.keys()
        settings = ImageSettings(**params, **{name: request.pop(name) for name in names})
        assert compute_image_id(**request, settings=settings) == expected, request


def test_a_manifest_gives_the_same_images_as_in_0_1_0(tmp_path: Path) -> None:
    golden = json.loads((FIXTURES / "image_ids.json").read_text(encoding="utf-8"))
    settings = {"model": str(MODEL), "seed": 3, "negative_prompt": "blurry"}
    job = open_job(FIXTURES / "ids.jsonl", tmp_path / "job", settings)
    rows = (row for row in job.read_rows() if isinstance(row, Row))
    images = [image for _, images in plan_images(rows, job.shared_settings()) for image in images]
    assert [[image.index, image.seed, image.file_name, image.image_id] for image in images] == golden["manifest"]


def test_a_packed_model_generates_the_same_image_as_in_0_1_0() -> None:
    """The image of seed 7 in the finished job differs by at most one level."""
    import numpy as np
    from PIL import Image

    file = FIXTURES / "finished" / "job" / "images" / "00000" / "seed_7_00001.png"
    model = loaded(MODEL, device="cpu")
    image = model.generate("red apple", 7, sampler="ddim", num_inference_steps=1, guidance_scale=1.0).images[0]
    difference = np.asarray(image, np.int16) - np.asarray(Image.open(file), np.int16)
    assert np.abs(difference).max() <= 1
