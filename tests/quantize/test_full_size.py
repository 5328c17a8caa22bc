"""Checkpoints of SD v1's size: 2.1 GB of random float16 weights, and tiny-stable-diffusion's file with random codes."""

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

from tests.support.models import ldm_checkpoint, tiny_stable_diffusion
from tests.support.program import command, environment
from tinysd_batch import TinySD

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]
COMPONENT_WEIGHTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
RANDOM_NUMBERS = 2**22  # repeated as often as needed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    entries, end = {}, 0
    for name, shape in ldm_checkpoint.full_size_shapes(ldm_checkpoint.Sizes()):
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    block = (0.02 * torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0))).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    yield path
    path.unlink()


def measure_peak_mb(*arguments: object, entry: str = "RssAnon") -> int:
    """Run the program and return its peak memory in MB: RssAnon without, VmHWM with mapped files."""
    process = subprocess.Popen(command(*arguments), env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL)
    peak_kb = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        entries = [int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{entry}:")]
        peak_kb = max([peak_kb, *entries])
        time.sleep(0.02)
    assert process.returncode == 0
    return peak_kb // 1000


def count_weights(path: Path) -> dict[str, int]:
    output = subprocess.run(command("inspect", path, "--json"), capture_output=True, text=True, check=True).stdout
    return {component["name"]: component["weights"] for component in json.loads(output)["parts"]}


def test_conversion_takes_little_memory(checkpoint: Path, tmp_path: Path) -> None:
    assert count_weights(checkpoint) == COMPONENT_WEIGHTS
    assert measure_peak_mb("convert", checkpoint, tmp_path / "model") < 800
    assert count_weights(tmp_path / "model") == COMPONENT_WEIGHTS


def test_data_free_quantization_takes_little_memory(checkpoint: Path, tmp_path: Path) -> None:
    assert measure_peak_mb("quantize", checkpoint, tmp_path / "model", "--level", "fast", "--no-samples") < 1500
    assert count_weights(tmp_path / "model") == COMPONENT_WEIGHTS
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 300_000_000


@pytest.fixture(scope="module")
def packed_tensors() -> dict[str, torch.Tensor]:
    return tiny_stable_diffusion.unet_checkpoint(base=320, context=768)


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory, packed_tensors: dict[str, torch.Tensor]) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tiny-stable-diffusion") / "full_int2_sd.pth"
    others = {
        name: 0.02 * torch.randn(shape) if len(shape) > 1 else torch.ones(shape)
        for name, shape in ldm_checkpoint.full_size_shapes(ldm_checkpoint.Sizes())
        if not name.startswith(ldm_checkpoint.UNET)
    }
    torch.save({**packed_tensors, **others}, path)
    yield path
    path.unlink()


def test_tiny_stable_diffusion_file_predicts_the_noise_of_its_dequantized_weights(
    packed_file: Path, packed_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    peak = measure_peak_mb("convert", packed_file, tmp_path / "model", "--allow-pickle", entry="VmHWM")
    assert peak < 1.5 * packed_file.stat().st_size / 1e6
    model = TinySD.from_pretrained(tmp_path / "model", device="cpu", dtype="full")
    with torch.device("meta"):
        unet = ldm_checkpoint.new_unet(ldm_checkpoint.Sizes())
    floats = convert_ldm_unet_checkpoint(tiny_stable_diffusion.dequantized(packed_tensors), dict(unet.config))
    unet.load_state_dict(floats, assign=True)
    generator = torch.Generator().manual_seed(3)
    for batch, height, width, timestep in ((1, 8, 8, 981.0), (3, 8, 16, 535.955)):
        latents = torch.randn(batch, 4, height, width, generator=generator)
        context = torch.randn(batch, 77, 768, generator=generator)
        with torch.no_grad(), model.offloader.holding(model.encode_fragment, model.decode_fragment):
            predicted = model.predict_noise(latents, torch.tensor(timestep), context)
            expected = unet.eval()(latents, torch.tensor(timestep), context).sample
        torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=1e-3)


def test_loading_takes_little_more_than_the_file(checkpoint: Path, tmp_path: Path) -> None:
    """A packed model takes the pages of its file that are read, and at most 100 MB more."""
    subprocess.run(
        command("quantize", checkpoint, tmp_path / "model", "--level", "fast", "--no-samples"),
        check=True,
        capture_output=True,
    )
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    script = f"""
from tinysd_batch.model.tiny_sd import TinySD
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
TinySD.from_pretrained({str(tmp_path / "model")!r}, device="cpu", dtype="full")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < size + 100e6
