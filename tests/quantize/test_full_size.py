"""Checkpoints of SD v1's own size: 2.1 GB of arbitrary float16 weights, and the origin's with random codes."""

import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from tests.support import ldm_checkpoint, tiny_stable_diffusion
from tests.support.program import command, environment
from tinysd_batch import TinySD

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]
PARTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
REPEATED = 2**22  # random numbers, over and over


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    entries, end = {}, 0
    for name, shape in ldm_checkpoint.full_size_shapes(ldm_checkpoint.Sizes()):
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


def peak_memory(*arguments: object, entry: str = "RssAnon") -> int:
    """Run the program and return the most memory it had, in MB: RssAnon without, VmHWM with the files it had mapped."""
    process = subprocess.Popen(command(*arguments), env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        most = max([most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{entry}:"))])
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
    assert peak_memory("quantize", checkpoint, tmp_path / "model", "--level", "fast", "--no-samples") < 1500
    assert weights(tmp_path / "model") == PARTS
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 300_000_000


@pytest.fixture(scope="module")
def origins_tensors() -> dict[str, torch.Tensor]:
    return tiny_stable_diffusion.unet_checkpoint(base=320, context=768)


@pytest.fixture(scope="module")
def origins_file(tmp_path_factory: pytest.TempPathFactory, origins_tensors: dict[str, torch.Tensor]) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("origin") / "full_int2_sd.pth"
    others = {
        name: 0.02 * torch.randn(shape) if len(shape) > 1 else torch.ones(shape)
        for name, shape in ldm_checkpoint.full_size_shapes(ldm_checkpoint.Sizes())
        if not name.startswith(ldm_checkpoint.UNET)
    }
    torch.save({**origins_tensors, **others}, path)
    yield path
    path.unlink()


def test_the_origins_file_predicts_the_noise_of_its_mathematics(
    origins_file: Path, origins_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    peak = peak_memory("convert", origins_file, tmp_path / "model", "--allow-pickle", entry="VmHWM")
    assert peak < 1.5 * origins_file.stat().st_size / 1e6
    ours = TinySD.from_pretrained(tmp_path / "model", device="cpu", dtype="full")
    with torch.device("meta"):
        unet = ldm_checkpoint.new_unet(ldm_checkpoint.Sizes())
    floats = convert_ldm_unet_checkpoint(tiny_stable_diffusion.dequantized(origins_tensors), dict(unet.config))
    unet.load_state_dict(floats, assign=True)
    generator = torch.Generator().manual_seed(3)
    for rows, height, width, when in ((1, 8, 8, 981.0), (3, 8, 16, 535.955)):
        latents = torch.randn(rows, 4, height, width, generator=generator)
        context = torch.randn(rows, 77, 768, generator=generator)
        with torch.no_grad(), ours.offloader.holding(ours.encode_fragment, ours.decode_fragment):
            found = ours.predict_noise(latents, torch.tensor(when), context)
            expected = unet.eval()(latents, torch.tensor(when), context).sample
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_loading_takes_little_more_than_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """A packed model in memory: the file's own pages, as far as they are looked at, and at most 100 MB."""
    subprocess.run(
        command("quantize", checkpoint, tmp_path / "model", "--level", "fast", "--no-samples"),
        check=True,
        capture_output=True,
    )
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    script = f"""
from tinysd_batch.model.pipeline import TinySD
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
TinySD.from_pretrained({str(tmp_path / "model")!r}, device="cpu", dtype="full")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < size + 100e6
