"""Damaged configurations: all commands apply the same checks and report the problem in one line."""

import codecs
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.files import write_json
from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import CONFIG_FILES

VALUES: list[Any] = [
    None, {}, [], "x", -1, 0, 3, 1e30, float("nan"), True, [[[1]]], [1, 2], ["a"], "", 2**70, [32] * 200,
]  # fmt: skip
# Valid values that a test cannot use: a size that is not a multiple of the model's, or one that is far too large.
VALID_BUT_UNUSABLE = {("sample_size", 3), ("sample_size", True)}
WITHOUT_SHAPE = {"bits": 2, "group_size": 16, "shape": 3}
Mutant = tuple[str, dict[str, Any]]


def change_entries(content: dict[str, Any], prefix: str = "") -> Iterator[Mutant]:
    """Yield the object with one entry replaced or removed."""
    for name in content:
        yield f"{prefix}{name} missing", {key: value for key, value in content.items() if key != name}
        for value in VALUES:
            if not any(name == key and value is unusable for key, unusable in VALID_BUT_UNUSABLE):
                yield f"{prefix}{name} = {str(value)[:30]}", {**content, name: value}


def mutants(config: dict[str, Any]) -> Iterator[Mutant]:
    """Change an entry of the configuration, of its quantization_config and of the first layer there."""
    yield from change_entries(config)
    if (quantization := config.get("quantization_config")) is None:
        return
    layers = quantization["layers"]
    first = next(iter(layers))
    inner = [*change_entries(quantization, "quantization_config.")]
    inner += [
        (name, {**quantization, "layers": entries})
        for name, entries in change_entries({first: layers[first]}, "layers.")
    ]
    for name, entry in change_entries(layers[first], f"{first}."):
        inner.append((name, {**quantization, "layers": {**layers, first: entry}}))
    yield from ((name, {**config, "quantization_config": changed}) for name, changed in inner)


def load_result(model: str) -> tuple[int, str]:
    """Return the exit code and message of loading a model."""
    try:
        TinySD.from_pretrained(model, device="cpu", dtype="full")
    except ModelError as error:
        return 2, f"tinysd-batch: {error}\n"
    return 0, ""


def check_mutants(here: Path, model: Path, part: str, chosen: list[Mutant]) -> None:
    """Assert that inspect, plan and loading agree on each."""
    config = model / part / CONFIG_FILES[part]
    for name, content in chosen:
        write_json(config, content)
        expected = load_result(model.name)
        for command in (f"inspect {model.name}", f"plan m.csv --model {model.name}"):
            done = run_here(*command.split(), cwd=here)
            assert done.returncode == expected[0], f"{part}: {name}: {command}: {done.stderr or expected}"
            if expected[0]:
                assert len(done.stderr.splitlines()) == 1, f"{part}: {name}: {command}: {done.stderr}"
                assert "Traceback" not in done.stderr


def sample(part: str, model: Path, count: int) -> list[Mutant]:
    """Return some mutants, the same in every run."""
    everything = list(mutants(json.loads((model / part / CONFIG_FILES[part]).read_text())))
    return random.Random(count).sample(everything, min(count, len(everything)))


@pytest.mark.parametrize(("part", "count"), [("unet", 7), ("vae", 2), ("text_encoder", 2), ("scheduler", 1)])
def test_some_damaged_configurations(here: Path, tiny_model: Path, part: str, count: int) -> None:
    shutil.copytree(tiny_model, here / "model")
    check_mutants(here, here / "model", part, sample(part, here / "model", count))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", CONFIG_FILES)
@pytest.mark.parametrize("model_fixture", ["tiny_model", "float_model"])
def test_all_damaged_configurations(here: Path, request: pytest.FixtureRequest, model_fixture: str, part: str) -> None:
    shutil.copytree(request.getfixturevalue(model_fixture), here / "model")
    check_mutants(here, here / "model", part, sample(part, here / "model", 10_000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("x", 'unet/config.json: quantization_config = "x": an object was expected'),
        ({"layers": []}, "unet/config.json: quantization_config: layers = []: an object was expected"),
        ({"layers": {"conv_in": 3}}, "unet/config.json: layer 'conv_in': 3: an object was expected"),
        (
            {"layers": {"conv_in": WITHOUT_SHAPE}},
            "unet/config.json: layer 'conv_in': shape = 3: a list of 2 or 4 whole numbers was expected",
        ),
        (
            {"layers": {"conv_in": {**WITHOUT_SHAPE, "shape": [32, 5]}}},
            "unet/config.json: layer 'conv_in': a row of 5 weights cannot be stored",
        ),
    ],
)
def test_inspect_of_damaged_quantization(here: Path, tiny_model: Path, change: Any, message: str) -> None:
    shutil.copytree(tiny_model, here / "model")
    config = here / "model" / "unet" / "config.json"
    if isinstance(change, dict):
        change = {"quant_method": "tinysd", **change}
    write_json(config, {**json.loads(config.read_text()), "quantization_config": change})
    done = run_here("inspect", "model", cwd=here)
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        ("unet", {"mid_block_type": None}, "unet/config.json: quantization_config names 18 layers that this UNet"),
        ("text_encoder", {"intermediate_size": 3}, "model/text_encoder: tensor encoder.layers.0.mlp.fc1.weight has"),
    ],
)
def test_errors_name_their_file(here: Path, tiny_model: Path, part: str, entry: dict[str, Any], message: str) -> None:
    shutil.copytree(tiny_model, here / "model")
    config = here / "model" / part / "config.json"
    write_json(config, {**json.loads(config.read_text()), **entry})
    assert message in load_result("model")[1]


@pytest.mark.parametrize("command", ["inspect pipe", "inspect model", "convert model out", "quantize model out"])
def test_named_pipes_are_refused(here: Path, float_model: Path, command: str) -> None:
    """Reading from one would block forever."""
    os.mkfifo(here / "pipe")
    shutil.copytree(float_model, here / "model")
    weights = here / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    done = run_here(*command.split(), cwd=here)
    assert done.returncode == 2
    assert "not a regular file" in done.stderr.splitlines()[-1].lower()
    assert not (here / "out").exists()


@pytest.mark.parametrize("command", ["convert model out", "quantize model out --level fast"])
def test_a_damaged_tokenizer_is_reported_before_converting(here: Path, float_model: Path, command: str) -> None:
    shutil.copytree(float_model, here / "model")
    (here / "model" / "tokenizer" / "merges.txt").write_text("#version\na b c d\n")
    done = run_here(*command.split(), cwd=here)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "model/tokenizer: not a readable CLIP tokenizer" in done.stderr


@pytest.mark.parametrize("missing", ["vae", "text_encoder/model.safetensors", "tokenizer/vocab.json", "scheduler"])
def test_inspect_refuses_an_incomplete_folder(here: Path, tiny_model: Path, missing: str) -> None:
    shutil.copytree(tiny_model, here / "model")
    path = here / "model" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    expected = load_result("model")
    done = run_here("inspect", "model", cwd=here)
    assert (done.returncode, done.stderr) == expected
    assert expected[0] == 2


def test_invalid_token_ids_are_refused(here: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, here / "model")
    config = here / "model" / "text_encoder" / "config.json"
    write_json(config, {**json.loads(config.read_text()), "eos_token_id": [1, 2]})
    code, message = load_result("model")
    assert code == 2
    assert "text_encoder/config.json: eos_token_id = [1, 2]: not supported; a token id was expected" in message


def test_byte_order_marks_are_accepted(here: Path, tiny_model: Path, float_model: Path) -> None:
    """Some editors on Windows write them."""
    expected = TinySD.from_pretrained(tiny_model, device="cpu").generate("cat", 1, output_type="np").images
    for model in (tiny_model, float_model):
        shutil.copytree(model, here / model.name)
        for file in (here / model.name).rglob("*.json"):
            file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
        done = run_here("inspect", model.name, cwd=here)
        assert done.returncode == 0, done.stderr
    images = TinySD.from_pretrained(tiny_model.name, device="cpu").generate("cat", 1, output_type="np").images
    assert (images == expected).all()
    assert run_here("convert", float_model.name, "out", cwd=here).returncode == 0
    assert run_here("inspect", "out", cwd=here).returncode == 0
