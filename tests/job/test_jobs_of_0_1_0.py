"""Jobs and a model that 0.1.0 left behind: this version reads, exports and finishes each, and changes no image of it.

`tests/fixtures/make_0_1_0.py` says how they were made. `expected.json` is what 0.1.0 itself made of each in the end.
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
from tinysd_batch.config import Settings
from tinysd_batch.job.plan.batches import plan_images
from tinysd_batch.job.plan.image_id import compute_image_id
from tinysd_batch.job.results.table import ResultsTable
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.model.pipeline import TinySD
from tinysd_batch.records import Row, SamplingParams

MODEL = FIXTURES / "model"
NAMES = sorted(folder.parent.name for folder in FIXTURES.glob("*/expected.json"))
STEPS = {"killed": 120}
LIMITS = {"large": ("--limit", 8), "killed": ("--limit", 6)}  # a few more than there are
KEPT = ("index", "row", "sample", "prompt", "seed", "image_id", "file_name", "status")

loaded = functools.cache(TinySD.from_pretrained)


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinySD, "from_pretrained", loaded)


def copy_of(name: str, folder: Path) -> tuple[Path, Path]:
    """The manifest and the job folder of a fixture, where they may change."""
    shutil.copytree(FIXTURES / name, folder / name)
    (manifest,) = (path for path in (folder / name).iterdir() if path.is_file() and path.name != "expected.json")
    return manifest, folder / name / "job"


def go_on(name: str, manifest: Path, job: Path, *more: object, command: str = "submit") -> CompletedProcess[str]:
    settings = ("--sampler", "ddim", "--steps", STEPS.get(name, 1), "--scale", 1, "--skip_grid", "--model", MODEL)
    only_submit = ("--inline", *LIMITS.get(name, ())) if command == "submit" else ()
    strict = ("--strict",) if name == "jsonl_strict" else ()
    return run_here(command, manifest, "-o", job, *settings, *strict, *only_submit, *more, cwd=job.parent)


def table_of(job: Path) -> list[dict[str, Any]]:
    rows = [row for file in ResultsTable(job).sealed_files() for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["row"], row["index"] or 0))


def expected(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((FIXTURES / name / "expected.json").read_text(encoding="utf-8"))
    return rows


def kept_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{column: row[column] for column in KEPT} for row in rows if row["index"] is not None]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_job_goes_on_as_it_began(name: str, tmp_path: Path) -> None:
    """Every image it would have made keeps index, seed, id and file; files that are there keep their bytes."""
    manifest, job = copy_of(name, tmp_path)
    files = {path: path.read_bytes() for path in job.rglob("*.png")}
    before = table_of(job)
    done = go_on(name, manifest, job)
    assert done.returncode in (0, 3), done.stderr
    rows = table_of(job)
    old = expected(name)
    made = {row["index"]: row for row in kept_columns(rows)}
    as_before = {row["index"]: row for row in kept_columns(old) if row["index"] <= LIMITS.get(name, ("", 99))[1]}
    assert {index: row for index, row in made.items() if index <= len(kept_columns(old))} == as_before
    assert all(path.read_bytes() == data for path, data in files.items())
    assert [row for row in before if row["index"] is not None and row not in rows] == []
    again = go_on(name, manifest, job)
    assert again.returncode == done.returncode, again.stderr
    assert table_of(job) == rows


@pytest.mark.parametrize("name", NAMES)
def test_an_old_job_is_read_planned_and_exported(name: str, tmp_path: Path) -> None:
    manifest, job = copy_of(name, tmp_path)
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    images = len({path for path in before if path.suffix == ".png"})
    told = run_here("status", job, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    # Of the killed job one image has no row yet: it is adopted when the job goes on.
    assert f"ok {images}" in " ".join(told.stdout.split()) or name == "killed"
    planned = go_on(name, manifest, job, "--json", command="plan")
    assert planned.returncode in (0, 3), planned.stderr
    assert json.loads(planned.stdout)["rows"] > 0
    exported = run_here("export", job, tmp_path / "table.jsonl", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = {row["index"]: row["image_id"] for row in expected(name)}
    assert lines
    assert all(ids[line["index"]] == line["image_id"] for line in lines if line["index"] is not None)
    after = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    assert after == before


def test_image_ids_are_what_they_were() -> None:
    golden = json.loads((FIXTURES / "image_ids.json").read_text(encoding="utf-8"))
    for request in golden["requests"]:
        width, height, steps, sampler, eta = request.pop("params")
        known = request.pop("image_id")
        assert compute_image_id(**request, params=SamplingParams(width, height, steps, sampler, eta)) == known, request


def test_a_manifest_gives_the_images_it_gave(tmp_path: Path) -> None:
    golden = json.loads((FIXTURES / "image_ids.json").read_text(encoding="utf-8"))
    settings = Settings(model=str(MODEL), seed=3, negative_prompt="blurry")
    job = open_job(FIXTURES / "ids.jsonl", tmp_path / "job", settings)
    rows = (row for row in job.read_rows() if isinstance(row, Row))
    images = [image for _, images in plan_images(rows, job.shared_settings()) for image in images]
    assert [[image.index, image.seed, image.file_name, image.image_id] for image in images] == golden["manifest"]


def test_a_packed_model_draws_what_it_drew() -> None:
    """The image of seed 7 in the finished job, at most one level off."""
    import numpy as np
    from PIL import Image

    file = FIXTURES / "finished" / "job" / "images" / "00000" / "seed_7_00001.png"
    model = loaded(MODEL, device="cpu")
    image = model.generate("red apple", 7, sampler="ddim", num_inference_steps=1, guidance_scale=1.0).images[0]
    difference = np.asarray(image, np.int16) - np.asarray(Image.open(file), np.int16)
    assert np.abs(difference).max() <= 1
