"""A killed calibration resumes, and writes the same bytes as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.models.small_unet import EMBEDDED, small_unet
from tests.support.program import command, environment, run
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE
from tinysd_batch.storage.atomic import TEMPORARY_PREFIX

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
LAYERS = 78
TARGET = 330_000
RECIPE = """
steps = 2
scale = 2.0
points = 2
tokens = 1024
prompts = ["red apple", "blue heart"]
held_out = ["lion", "bell"]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The embedded model with a small float UNet."""
    folder = tmp_path / "floats"
    shutil.copytree(EMBEDDED, folder)
    shutil.rmtree(folder / "unet")
    small_unet().save_pretrained(folder / "unet")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return folder


def arguments(source: Path, out: Path) -> list[object]:
    recipe = source.parent / "recipe.toml"
    return [
        "quantize", source, out, "--level", "calib", "--recipe", recipe, "--device", "cpu", "--target-size", TARGET,
    ]  # fmt: skip


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_calibration_resumes(source: Path, tmp_path: Path, signal_number: int) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(*arguments(source, out)), env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL
    )
    layers = tmp_path / "killed.work" / "layers"
    while len(list(layers.glob("*.safetensors"))) < 20:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(process.pid, signal_number)
    process.wait()
    assert not out.exists()
    finished = len(list(layers.glob("*.safetensors")))
    assert 20 <= finished < LAYERS
    resumed = run(*arguments(source, out), OMP_NUM_THREADS="1")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming: {finished} of {LAYERS} layers are finished" in resumed.stderr
    uninterrupted = tmp_path / "uninterrupted"
    assert run(*arguments(source, uninterrupted), OMP_NUM_THREADS="1").returncode == 0
    assert (out / "unet" / WEIGHTS_FILE).read_bytes() == (uninterrupted / "unet" / WEIGHTS_FILE).read_bytes()
    assert 0.98 * TARGET < (out / "unet" / WEIGHTS_FILE).stat().st_size <= TARGET
    assert json.loads((out / "report" / "report.json").read_text())["final_latents_sqnr_db"] > 0
    assert not (tmp_path / "killed.work").exists()
    assert not list(tmp_path.rglob(f"{TEMPORARY_PREFIX}*"))
