"""`make` looks for the GPU and takes a torch that has code for it (case 34)."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

GTX, RTX, BLACKWELL = "NVIDIA GeForce GTX 1060 6GB", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"
OLD_QUERY = 'case "$*" in *compute_cap*) echo "Field \\"compute_cap\\" is not valid" ; exit 2 ;; esac\n'
NO_DRIVER = 'echo "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."\nexit 9\n'


def lines(*gpus: str) -> str:
    """A nvidia-smi that finds these."""
    return "".join(f"echo '{gpu}'\n" for gpu in gpus)


def ask(folder: Path, nvidia_smi: str | None, *command: str) -> tuple[str, str]:
    """What the script prints on stdout and stderr on a machine whose nvidia-smi is this shell script."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("sh", "awk", "head", "make", "env"):
        (found,) = [path for path in map(Path, (f"/usr/bin/{name}", f"/bin/{name}")) if path.exists()][:1]
        (tools / name).symlink_to(found)
    if nvidia_smi is not None:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}")
        (tools / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        command or ("sh", "configs/torch_build.sh"), cwd=ROOT, env={**os.environ, "PATH": str(tools)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize(
    ("nvidia_smi", "build", "told"),
    [
        (lines(f"{GTX}, 6.1, 575.51"), "cu126", "GTX 1060 6GB (compute capability 6.1): needs torch for CUDA 12.6"),
        (lines("NVIDIA GeForce GTX 980, 5.2, 580.1"), "cu126", "torch 2.14 is announced as the last"),
        (lines("Tesla V100, 7.0, 580.1"), "cu126", "needs torch for CUDA 12.6"),
        (lines("Tesla T4, 7.5, 580.65.06"), "", "Tesla T4 (compute capability 7.5): the usual build"),
        (lines(f"{RTX}, 8.9, 590.1"), "", "the usual build"),
        (lines(f"{BLACKWELL}, 12.0, 590.1"), "", "the usual build"),
        (lines(f"{RTX}, 8.9, 580.1", f"{GTX}, 6.1, 580.1"), "cu126", "GTX 1060"),
        (lines(f"{BLACKWELL}, 12.0, 580.1", f"{GTX}, 6.1, 580.1"), "", "no build of torch has code for both"),
        (lines(f"{RTX}, 8.9, 550.144.03"), "cu126", "NVIDIA driver 550.144.03: too old for CUDA 13"),
        (lines(f"{BLACKWELL}, 12.0, 570.1"), "", "needs NVIDIA driver 580"),
        (lines(f"{GTX}, 6.1, 470.2"), "", "update it to 525"),
        (lines("Tesla K40, 3.5, 470.2"), "", "too old for any build of torch"),
        (lines("[Unknown Error], [N/A], [N/A]"), "", "names no GPU"),
        ("true\n", "", "names no GPU"),
        (OLD_QUERY + lines(f"{GTX}, 418.1"), "", "driver is too old for torch (NVIDIA GeForce GTX 1060 6GB, 418.1)"),
        (NO_DRIVER, "", "nvidia-smi finds no GPU or no driver. The CPU build"),
        (None, "", "No NVIDIA GPU found (no nvidia-smi). The CPU build"),
    ],
)  # fmt: skip
def test_the_build_that_suits_the_gpu(tmp_path: Path, nvidia_smi: str | None, build: str, told: str) -> None:
    found, said = ask(tmp_path, nvidia_smi)
    assert found == build
    assert told in said


def test_make_names_the_index(tmp_path: Path) -> None:
    found, _ = ask(tmp_path, lines(f"{GTX}, 6.1, 575.51"), "make", "-s", "gpu")
    assert found == "TORCH_INDEX=https://download.pytorch.org/whl/cu126"
