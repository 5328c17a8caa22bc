"""A source's tokenizer, old or new, splits text the same before and after convert and quantize."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.files import snapshot, write_json
from tests.support.program import run_here
from tinysd_batch import TinySD
from tinysd_batch.model.text.prompt_syntax import parse_prompt
from tinysd_batch.model.text.tokenizer import read_tokenizer, tokenize_prompt

PROMPT = "a photo of <my-cat>, <my-cat> and x<my-cat>y, 4k"
Write = Callable[[Path, int], object]


def ids_of(folder: Path) -> tuple[int, ...]:
    (part,) = tokenize_prompt(read_tokenizer(folder), parse_prompt(PROMPT, "none"), 100, long_prompts=False).sub_prompts
    return part.windows[0].ids


def add_to_config(folder: Path, number: int, **entry: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    token = {
        "content": "<my-cat>",
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "single_word": False,
        "special": False,
    }
    write_json(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": {str(number): token}, **entry})


def save_again(folder: Path, number: int, *, only: bool = False) -> None:
    """Save the tokenizer as current transformers does; `only` asserts that the older files are gone."""
    write_json(folder / "added_tokens.json", {"<my-cat>": number})
    tokenizer = read_tokenizer(folder)
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)
    if only:
        assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


TOKEN_WRITERS: dict[str, Write] = {
    "added_tokens": lambda folder, number: write_json(folder / "added_tokens.json", {"<my-cat>": number}),
    "special_tokens": lambda folder, _: write_json(
        folder / "special_tokens_map.json", {"additional_special_tokens": ["<my-cat>"]}
    ),
    "added_tokens_decoder": add_to_config,
    "tokenizer": save_again,
}


@pytest.fixture
def model(float_model: Path, here: Path) -> Path:
    """A model with a learned word: its text encoder has one more embedding than its tokenizer has tokens."""
    model = here / "model"
    shutil.copytree(float_model, model)
    weights, config = model / "text_encoder" / "model.safetensors", model / "text_encoder" / "config.json"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    torch.manual_seed(1)
    tensors[name] = torch.cat([tensors[name], torch.randn(1, tensors[name].shape[1])])
    save_file(tensors, weights)
    write_json(config, {**json.loads(config.read_text()), "vocab_size": len(tensors[name])})
    return model


@pytest.mark.parametrize("writer", TOKEN_WRITERS)
def test_added_tokens_stay_tokens(model: Path, here: Path, writer: str) -> None:
    number = len(read_tokenizer(model / "tokenizer"))
    TOKEN_WRITERS[writer](model / "tokenizer", number)
    expected = ids_of(model / "tokenizer")
    assert number in expected
    assert run_here("convert", "model", "out", cwd=here).returncode == 0
    assert ids_of(here / "out" / "tokenizer") == expected
    if writer == "added_tokens":
        check_same_image(here)


def check_same_image(here: Path) -> None:
    before, after = (
        TinySD.from_pretrained(folder, device="cpu", dtype="full").generate(PROMPT, 1, output_type="np").images
        for folder in ("model", "out")
    )
    assert (before == after).all()
    assert run_here("quantize", "model", "packed", "--level", "fast", cwd=here).returncode == 0
    assert ids_of(here / "packed" / "tokenizer") == ids_of(here / "model" / "tokenizer")


def test_a_tokenizer_is_copied_byte_for_byte(float_model: Path, here: Path) -> None:
    """Otherwise the digest of a model without added tokens would differ from that of earlier versions."""
    assert run_here("convert", float_model, "out", cwd=here).returncode == 0
    files = {file.name: file.read_bytes() for file in (float_model / "tokenizer").iterdir()}
    assert {file.name: file.read_bytes() for file in (here / "out" / "tokenizer").iterdir()} == files


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"<my-cat>": 10**6}}, "token '<my-cat>' is number '1000000', and would be read as 2627"),
        ({"added_tokens.json": {"<a>": 2627, "<b>": 2628}}, "is number 2628, the text encoder has only 2628 tokens"),
        ({"vocab.json": None}, "tokenizer/vocab.json: missing"),
        ({"added_tokens.json": [3]}, "not a readable CLIP tokenizer"),
        ({"added_tokens.json": {"<my-cat>": "x"}}, "token '<my-cat>' is number 'x', and would be read as"),
    ],
)
def test_an_unsupported_tokenizer_is_refused(model: Path, here: Path, files: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        if content is None:
            (model / "tokenizer" / name).unlink()
        else:
            write_json(model / "tokenizer" / name, content)
    before = snapshot(here)
    for command in (
        "convert model out",
        "quantize model out --level fast",
        "inspect model",
        "txt2img cat --model model",
    ):
        result = run_here(*command.split(), cwd=here)
        assert (result.returncode, message in result.stderr) == (2, True), f"{command}: {result.stderr}"
    assert snapshot(here) == before
