"""The wheel alone, in an environment of its own, from another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.jobs import check_whole
from tests.support.paths import ROOT
from tests.support.program import environment
from tinysd_batch.model.packed import cpu_build


@pytest.mark.alone
@pytest.mark.slow
def test_the_wheel_draws_by_itself(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("tinysd_batch-*.whl")
    assert wheel.stat().st_size < 15_000_000
    assert wheel.name.endswith("-py3-none-any.whl") is (cpu_build.find_compiler() is None)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    # Torch and the other libraries come from this environment; the package itself must come from the wheel.
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import torch; from tinysd_batch.model import unpacking; "
        "print(unpacking.__file__, unpacking.has_kernels(torch.device('cpu')))"
    )
    told = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert told[0].startswith(str(venv))
    assert told[1] == str(cpu_build.find_compiler() is not None)
    (tmp_path / "m.csv").write_text("prompt,steps\nred apple,5\n")
    command = [str(venv / "bin" / "tinysd-batch"), "submit", "m.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_whole(tmp_path / "outputs" / "m", 1)


@pytest.mark.slow
def test_a_wheel_is_built_without_a_compiler(tmp_path: Path) -> None:
    """Of a copy, without what was compiled in the folder itself. Warned of; torch's operators unpack then."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "tinysd_batch", source / "tinysd_batch", ignore=shutil.ignore_patterns("unpack-*"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path), str(source)]
    done = subprocess.run(
        command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no C compiler" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("tinysd_batch-*-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
