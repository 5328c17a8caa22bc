"""The model inside the package: its size, its digests, and that its images show what the prompt asks for."""

import hashlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.paths import ROOT
from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.model.checkpoint.info import WEIGHTS_FILE, embedded_model_path

STEPS = 12


@pytest.fixture(scope="module")
def model() -> TinySD:
    return TinySD.from_pretrained("embedded", device="cpu")


def mean_colour(model: TinySD, prompt: str) -> np.ndarray:
    """Return the mean colour over four seeds, without the white background."""
    images = model.generate([prompt] * 4, [1, 2, 3, 4], num_inference_steps=STEPS, output_type="np").images
    foreground = images[images.min(axis=3) < 0.85]
    assert len(foreground) > 0.05 * images[..., 0].size, "the images are almost empty"
    return np.asarray(foreground.mean(axis=0))


def test_it_is_at_most_15_megabytes() -> None:
    assert sum(path.stat().st_size for path in embedded_model_path().rglob("*") if path.is_file()) <= 15_000_000


def test_files_match_the_digests_recorded_by_training() -> None:
    digests = json.loads((ROOT / "training" / "digests.json").read_text())
    assert digests
    for name, digest in digests.items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest, name


def test_most_of_its_unet_is_at_two_bits() -> None:
    unet = embedded_model_path() / "unet"
    layers = json.loads((unet / "config.json").read_text())["quantization_config"]["layers"]
    weights: Counter[int] = Counter()
    for layer in layers.values():
        weights[layer["bits"]] += math.prod(layer["shape"])
    assert weights.total() > 0.95 * 14.9e6
    assert weights[2] > 0.85 * weights.total()
    stored = load_file(unet / WEIGHTS_FILE)
    packed = [
        tensor for name, tensor in stored.items() if name.rpartition(".")[0] in layers and not name.endswith(".bias")
    ]
    assert 8 * sum(tensor.nbytes for tensor in packed) < 2.5 * weights.total()


def test_the_report_describes_these_weights() -> None:
    """Check level, bits and bytes of the report in the repository."""
    report = json.loads((ROOT / "training" / "report" / "report.json").read_text())
    config = json.loads((embedded_model_path() / "unet" / "config.json").read_text())["quantization_config"]
    assert report["level"] == config["level"]
    assert report["unet_bytes"] == (embedded_model_path() / "unet" / WEIGHTS_FILE).stat().st_size
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert all(bits[name] == layer["bits"] for name, layer in config["layers"].items())


def test_inspect_prints_its_name(tmp_path: Path) -> None:
    assert "tinysd emoji 64" in run_here("inspect", "embedded", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("prompt", "strong", "weak"),
    [
        ("red heart", 0, 2),
        pytest.param("green heart", 1, 0, marks=pytest.mark.slow),
        pytest.param("blue heart", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_hearts_have_the_colour_of_the_prompt(model: TinySD, prompt: str, strong: int, weak: int) -> None:
    colour = mean_colour(model, prompt)
    assert colour[strong] > colour[weak] + 0.15, colour


def test_different_prompts_give_different_images(model: TinySD) -> None:
    prompts = ["red apple", "frog", "skull", "blue heart", "sunflower", "snowman"]
    images = model.generate(prompts, 3, num_inference_steps=STEPS, output_type="np").images
    for first, second in itertools.combinations(range(len(prompts)), 2):
        assert np.abs(images[first] - images[second]).mean() > 0.05, (prompts[first], prompts[second])
