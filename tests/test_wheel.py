"""The wheel alone, in an environment of its own, from another folder."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.tools import check_whole, environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_draws_by_itself(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("tinysd_batch-*.whl")
    assert wheel.stat().st_size < 15_000_000
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    # Torch and the other libraries come from this environment; the package itself must come from the wheel.
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import tinysd_batch; print(tinysd_batch.__file__)"
    where = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(venv))
    (tmp_path / "m.csv").write_text("prompt,steps\nred apple,5\n")
    command = [str(venv / "bin" / "tinysd-batch"), "submit", "m.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_whole(tmp_path / "outputs" / "m", 1)
