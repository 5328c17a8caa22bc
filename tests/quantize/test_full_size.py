"""A checkpoint of SD v1's own size: 2.1 GB of arbitrary float16 weights."""

import json
import math
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ldm
from tests.tools import command, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PARTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
REPEATED = 2**22  # random numbers, over and over


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    entries, end = {}, 0
    for name, shape in ldm.full_size_shapes(ldm.Sizes()):
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    block = (0.02 * torch.randn(REPEATED, generator=torch.Generator().manual_seed(0))).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    yield path
    path.unlink()


def peak_memory(*arguments: object) -> int:
    """Run the program and return the most memory it had, in MB, without the files that it had mapped."""
    process = subprocess.Popen(command(*arguments), env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max([most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))])
        time.sleep(0.02)
    assert process.returncode == 0
    return most // 1000


def weights(path: Path) -> dict[str, int]:
    told = subprocess.run(command("inspect", path, "--json"), capture_output=True, text=True, check=True).stdout
    return {part["name"]: part["weights"] for part in json.loads(told)["parts"]}


def test_converting_takes_little_memory(checkpoint: Path, tmp_path: Path) -> None:
    assert weights(checkpoint) == PARTS
    assert peak_memory("convert", checkpoint, tmp_path / "model") < 800
    assert weights(tmp_path / "model") == PARTS


def test_quantizing_takes_little_memory(checkpoint: Path, tmp_path: Path) -> None:
    assert peak_memory("quantize", checkpoint, tmp_path / "model") < 1500
    assert weights(tmp_path / "model") == PARTS
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 260_000_000
