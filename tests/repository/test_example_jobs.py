"""The example jobs and presets are valid, mentioned in the documentation, and show what they promise."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.repository.stored_pixels import assert_pixels_as_stored
from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.program import run
from tinysd_batch.job.manifest.validate import read_rows
from tinysd_batch.job.state.open_job import open_job
from tinysd_batch.quantize.recipe import read_recipe
from tinysd_batch.records import InvalidRow, Row
from tinysd_batch.settings.sampler_names import SAMPLERS
from tinysd_batch.settings.sources import read_job_file, read_preset

JOBS = sorted((ROOT / "jobs").glob("*/job.toml"))
RECIPES = sorted((ROOT / "configs" / "quantize").glob("*.toml"))
PRESETS = sorted(set((ROOT / "configs").rglob("*.toml")) - set(RECIPES))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.parent.name)
def test_every_job_opens(path: Path, tmp_path: Path) -> None:
    settings, manifest, _ = read_job_file(path)
    job = open_job(manifest, tmp_path / "job", settings)
    rows = list(read_rows(job.manifest, job.row_defaults()))
    invalid = [row for row in rows if isinstance(row, InvalidRow)]
    assert bool(invalid) == (path.parent.name == "broken")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_and_mentioned(path: Path) -> None:
    read_preset(path)
    name = path.relative_to(ROOT).as_posix()
    assert any(name in text.read_text(encoding="utf-8") for text in [*JOBS, ROOT / "docs" / "manifest.md"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    assert read_recipe(path).prompts


def test_demo_has_twelve_rows() -> None:
    settings, manifest, _ = read_job_file(ROOT / "jobs" / "demo" / "job.toml")
    job = open_job(manifest, Path("nowhere"), settings)
    rows = list(read_rows(manifest, job.row_defaults()))
    assert len(rows) == 12
    assert all(isinstance(row, Row) for row in rows)


def test_broken_job_generates_valid_rows_and_lists_the_others(tmp_path: Path) -> None:
    for folder in ("jobs", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    done = run("submit", "jobs/broken/job.toml", cwd=tmp_path)
    assert done.returncode == 3
    rows = check_whole(tmp_path / "outputs" / "broken", 2)
    invalid = [row for row in rows if row["status"] == "invalid"]
    assert len(invalid) == 10
    for column in ("prompt", "seed", "height", "steps", "sampler", "scale", "n_samples"):
        assert any(column in row["error_message"] for row in invalid), column


def run_job(name: str, tmp_path: Path, images: int, *options: str) -> list[dict[str, Any]]:
    done = run("submit", ROOT / "jobs" / name / "job.toml", "-o", tmp_path / name, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / name / "contact_sheet.png").exists()
    return check_whole(tmp_path / name, images)


def bytes_of(job: Path, row: dict[str, Any]) -> bytes:
    with Image.open(job / row["file_name"]) as image:
        return image.tobytes()


@pytest.mark.alone
@pytest.mark.slow
def test_long_prompts_job_encodes_prompts_in_full(tmp_path: Path) -> None:
    rows = run_job("long-prompts", tmp_path, 6)
    assert all(row["n_tokens"] > 40 and row["truncated"] is None for row in rows)
    assert (
        len({bytes_of(tmp_path / "long-prompts", row) for row in rows}) == 6
    )  # the prompts differ only in their last words


@pytest.mark.alone
@pytest.mark.slow
def test_weighted_job_turns_an_apple_into_a_lemon(tmp_path: Path) -> None:
    rows = run_job("weighted", tmp_path, 12)
    greens = []
    for row in rows[2:7]:
        with Image.open(tmp_path / "weighted" / row["file_name"]) as image:
            greens.append(image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[1])  # type: ignore[index]
    assert greens == sorted(greens)
    assert_pixels_as_stored("weighted", tmp_path / "weighted", rows)


@pytest.mark.alone
@pytest.mark.slow
def test_samplers_job_uses_every_sampler(tmp_path: Path) -> None:
    rows = run_job("samplers", tmp_path, 33)
    assert {row["sampler"] for row in rows} == set(SAMPLERS)
    assert len({bytes_of(tmp_path / "samplers", row) for row in rows}) == 33
    assert_pixels_as_stored("samplers", tmp_path / "samplers", rows)


@pytest.mark.alone
@pytest.mark.slow
def test_two_runs_of_the_demo_are_identical(tmp_path: Path) -> None:
    """With Ray and inline: same ids, same seeds, same pixels."""
    runs = []
    for name, options in (("ray", []), ("inline", ["--inline"])):
        done = run("submit", ROOT / "jobs" / "demo" / "job.toml", "-o", tmp_path / name, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = check_whole(tmp_path / name, 24)
        assert (tmp_path / name / "contact_sheet.png").exists()
        assert_pixels_as_stored("demo", tmp_path / name, rows)
        pixels = [Image.open(tmp_path / name / row["file_name"]).tobytes() for row in rows]
        runs.append([(row["image_id"], row["seed"], image) for row, image in zip(rows, pixels, strict=True)])
    assert runs[0] == runs[1]
