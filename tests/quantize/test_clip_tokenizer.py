"""CLIP's tokenizer as it ships, against another implementation's ids (see how in clip_tokens.json)."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from tinysd_batch.model.prompts import parse_prompt
from tinysd_batch.model.tokens import read_tokenizer, tokenize_prompt
from tinysd_batch.quantize.clip_tokenizer import BEGIN, END, VOCABULARY, write_tokenizer

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("clip_tokens.json").read_text())["texts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    write_tokenizer(folder, 77)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return read_tokenizer(folder)


def test_its_vocabulary(folder: Path, tokenizer: CLIPTokenizer) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == VOCABULARY == len(tokenizer)
    assert sorted(vocabulary.values()) == list(range(VOCABULARY))
    assert (vocabulary["!"], vocabulary[BEGIN], vocabulary[END]) == (0, 49406, 49407)
    assert tokenizer.model_max_length == 77


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"][:20]))
def test_ids_are_those_of_an_independent_tokenizer(tokenizer: CLIPTokenizer, case: dict[str, Any]) -> None:
    ids = tokenizer(case["text"], add_special_tokens=False, verbose=False).input_ids
    assert ids == case.get("ours", case["open_clip"])
    assert ("ours" in case) == ("why" in case)


def test_most_texts_give_the_same_ids() -> None:
    assert len(CASES) >= 50
    assert sum("ours" not in case for case in CASES) >= 40


def test_a_prompt_is_filled_up_with_end_marks(tokenizer: CLIPTokenizer) -> None:
    (part,) = tokenize_prompt(tokenizer, parse_prompt("a cat", "none"), 77, long_prompts=False).parts
    (piece,) = part.pieces
    assert piece.ids == (49406, 320, 2368, *[49407] * 74)
