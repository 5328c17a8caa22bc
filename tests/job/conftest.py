"""Manifests and small jobs for tests."""

import functools
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.damaged_jobs import FAST_OPTIONS, FIVE_ROWS, Command
from tests.support.files import write_csv
from tests.support.program import run_here
from tinysd_batch.model.tiny_sd import TinySD

load_model = functools.cache(TinySD.from_pretrained)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Six images of three rows, and an invalid row."""
    return write_csv(tmp_path / "m.csv", [
        {"prompt": "red apple", "seed": 7, "n_samples": 3, "note": "a"},
        {"prompt": "cat", "seed": "", "n_samples": "", "note": "b"},
        {"prompt": "dog", "seed": "oops", "n_samples": 2, "note": "c"},
        {"prompt": "owl", "seed": 9, "n_samples": 2, "note": "d"},
    ])  # fmt: skip


@pytest.fixture
def submit(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `submit m.csv`, or another command, in this process with fast options, on a manifest of five images."""
    monkeypatch.setattr(TinySD, "from_pretrained", load_model)
    (tmp_path / "m.csv").write_text(FIVE_ROWS)

    def run_submit(*arguments: object, command: str = "submit") -> CompletedProcess[str]:
        inline = ("--inline", "--skip_grid") if command == "submit" else ()
        return run_here(command, "m.csv", *FAST_OPTIONS, "--model", tiny_model, *inline, *arguments, cwd=tmp_path)

    return run_submit


@pytest.fixture(scope="module")
def five_images(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished job of five images, which tests must not change."""
    folder = tmp_path_factory.mktemp("five_images")
    (folder / "m.csv").write_text(FIVE_ROWS)
    done = run_here(
        "submit", "m.csv", *FAST_OPTIONS, "--model", tiny_model, "--inline", "--skip_grid", "-o", "job", cwd=folder
    )
    assert done.returncode == 0
    return folder / "job"


@pytest.fixture
def finished_job(five_images: Path, tmp_path: Path) -> Path:
    """A finished job of five images, which a test may change."""
    return Path(shutil.copytree(five_images, tmp_path / "job"))
