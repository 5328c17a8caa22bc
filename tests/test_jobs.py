"""The example jobs and presets are valid, used, and do what they say."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.tools import check_whole, run
from tinysd_batch.config import read_job_file, read_preset, resolve
from tinysd_batch.job.folder import open_job
from tinysd_batch.job.manifest import read_rows
from tinysd_batch.records import InvalidRow, Row

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*/job.toml"))
PRESETS = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.parent.name)
def test_every_job_opens(path: Path, tmp_path: Path) -> None:
    settings, manifest, _ = read_job_file(path)
    job = open_job(manifest, tmp_path / "job", resolve(settings))
    rows = list(read_rows(job.manifest, job.defaults()))
    bad = [row for row in rows if isinstance(row, InvalidRow)]
    assert bool(bad) == (path.parent.name == "broken")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_and_named_somewhere(path: Path) -> None:
    read_preset(path)
    name = path.relative_to(ROOT).as_posix()
    assert any(name in text.read_text(encoding="utf-8") for text in [*JOBS, ROOT / "README.md"])


def test_the_demo_has_twelve_rows() -> None:
    settings, manifest, _ = read_job_file(ROOT / "jobs" / "demo" / "job.toml")
    job = open_job(manifest, Path("nowhere"), resolve(settings))
    rows = list(read_rows(manifest, job.defaults()))
    assert len(rows) == 12
    assert all(isinstance(row, Row) for row in rows)


def test_the_broken_job_draws_what_is_right_and_names_the_rest(tmp_path: Path) -> None:
    for folder in ("jobs", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    done = run("submit", "jobs/broken/job.toml", cwd=tmp_path)
    assert done.returncode == 3
    rows = check_whole(tmp_path / "outputs" / "broken", 2)
    invalid = [row for row in rows if row["status"] == "invalid"]
    assert len(invalid) == 10
    for column in ("prompt", "seed", "height", "steps", "sampler", "scale", "n_samples"):
        assert any(column in row["error_message"] for row in invalid), column


@pytest.mark.slow
def test_two_runs_of_the_demo_are_the_same(tmp_path: Path) -> None:
    """With Ray and in process: same identities, same seeds, same pixels."""
    runs = []
    for name, options in (("ray", []), ("inline", ["--inline"])):
        done = run("submit", ROOT / "jobs" / "demo" / "job.toml", "-o", tmp_path / name, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = check_whole(tmp_path / name, 24)
        assert (tmp_path / name / "contact_sheet.png").exists()
        pixels = [Image.open(tmp_path / name / row["file_name"]).tobytes() for row in rows]
        runs.append([(row["image_id"], row["seed"], picture) for row, picture in zip(rows, pixels, strict=True)])
    assert runs[0] == runs[1]
