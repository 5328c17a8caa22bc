"""The wheel, installed into a separate environment and run from another folder."""

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
def test_installed_wheel_generates_images(tmp_path: Path) -> None:
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
        "import torch; from tinysd_batch.model.packed import dequantize; "
        "print(dequantize.__file__, dequantize.has_working_kernels(torch.device('cpu')))"
    )
    output = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    path, has_kernels = output.split()
    assert path.startswith(str(venv))
    assert has_kernels == str(cpu_build.find_compiler() is not None)
    (tmp_path / "m.csv").write_text("prompt,steps\nred apple,5\n")
    command = [str(venv / "bin" / "tinysd-batch"), "submit", "m.csv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_whole(tmp_path / "outputs" / "m", 1)


@pytest.mark.slow
def test_wheel_is_built_without_a_compiler(tmp_path: Path) -> None:
    """Build a copy without compiled libraries. The build warns, and torch's operators dequantize then."""
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
