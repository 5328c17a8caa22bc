"""`make` detects the GPU and installs a torch build that has code for it (case 34)."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

GTX, RTX, BLACKWELL = "NVIDIA GeForce GTX 1060 6GB", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"
OLD_QUERY = 'case "$*" in *compute_cap*) echo "Field \\"compute_cap\\" is not valid" ; exit 2 ;; esac\n'
NO_DRIVER = 'echo "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."\nexit 9\n'


def list_gpus(*gpus: str) -> str:
    """Return an nvidia-smi script that lists these GPUs."""
    return "".join(f"echo '{gpu}'\n" for gpu in gpus)


def run(folder: Path, nvidia_smi: str | None, *command: str) -> tuple[str, str]:
    """Run the script on a machine with this nvidia-smi. Returns stdout and stderr."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("sh", "awk", "head", "make", "env"):
        path = next(path for path in map(Path, (f"/usr/bin/{name}", f"/bin/{name}")) if path.exists())
        (tools / name).symlink_to(path)
    if nvidia_smi is not None:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}")
        (tools / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        command or ("sh", "configs/torch_build.sh"), cwd=ROOT, env={**os.environ, "PATH": str(tools)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize(
    ("nvidia_smi", "build", "message"),
    [
        (list_gpus(f"{GTX}, 6.1, 575.51"), "cu126", "GTX 1060 6GB (compute capability 6.1): needs torch for CUDA 12.6"),
        (list_gpus("NVIDIA GeForce GTX 980, 5.2, 580.1"), "cu126", "torch 2.14 is announced as the last"),
        (list_gpus("Tesla V100, 7.0, 580.1"), "cu126", "needs torch for CUDA 12.6"),
        (list_gpus("Tesla T4, 7.5, 580.65.06"), "", "Tesla T4 (compute capability 7.5): the default build"),
        (list_gpus(f"{RTX}, 8.9, 590.1"), "", "the default build"),
        (list_gpus(f"{BLACKWELL}, 12.0, 590.1"), "", "the default build"),
        (list_gpus(f"{RTX}, 8.9, 580.1", f"{GTX}, 6.1, 580.1"), "cu126", "GTX 1060"),
        (list_gpus(f"{BLACKWELL}, 12.0, 580.1", f"{GTX}, 6.1, 580.1"), "", "no build of torch has code for both"),
        (list_gpus(f"{RTX}, 8.9, 550.144.03"), "cu126", "NVIDIA driver 550.144.03: too old for CUDA 13"),
        (list_gpus(f"{BLACKWELL}, 12.0, 570.1"), "", "needs NVIDIA driver 580"),
        (list_gpus(f"{GTX}, 6.1, 470.2"), "", "update it to 525"),
        (list_gpus("Tesla K40, 3.5, 470.2"), "", "too old for any build of torch"),
        (list_gpus("[Unknown Error], [N/A], [N/A]"), "", "reports no GPU"),
        ("true\n", "", "reports no GPU"),
        (OLD_QUERY + list_gpus(f"{GTX}, 418.1"), "", f"driver is too old for torch ({GTX}, 418.1)"),
        (NO_DRIVER, "", "nvidia-smi finds no GPU or no driver. The CPU build"),
        (None, "", "No NVIDIA GPU found (no nvidia-smi). The CPU build"),
    ],
)  # fmt: skip
def test_build_is_chosen_by_gpu_and_driver(tmp_path: Path, nvidia_smi: str | None, build: str, message: str) -> None:
    stdout, stderr = run(tmp_path, nvidia_smi)
    assert stdout == build
    assert message in stderr


def test_make_prints_the_wheel_index(tmp_path: Path) -> None:
    stdout, _ = run(tmp_path, list_gpus(f"{GTX}, 6.1, 575.51"), "make", "-s", "gpu")
    assert stdout == "TORCH_INDEX=https://download.pytorch.org/whl/cu126"
