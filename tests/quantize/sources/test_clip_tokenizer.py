"""CLIP's tokenizer as it ships, compared with another implementation's ids (clip_tokens.json says how)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from tinysd_batch.model.text.prompt_syntax import parse_prompt
from tinysd_batch.model.text.tokenizer import read_tokenizer, tokenize_prompt
from tinysd_batch.quantize.sources.clip_tokenizer import BOS_TOKEN, EOS_TOKEN, VOCAB_SIZE, write_clip_tokenizer

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("clip_tokens.json").read_text())["texts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    write_clip_tokenizer(folder, 77)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return read_tokenizer(folder)


def test_its_vocabulary(folder: Path, tokenizer: CLIPTokenizer) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == VOCAB_SIZE == len(tokenizer)
    assert sorted(vocabulary.values()) == list(range(VOCAB_SIZE))
    assert (vocabulary["!"], vocabulary[BOS_TOKEN], vocabulary[EOS_TOKEN]) == (0, 49406, 49407)
    assert tokenizer.model_max_length == 77


def ids_of(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """Return the token ids of a text, without begin and end tokens."""
    (part,) = tokenize_prompt(tokenizer, parse_prompt(text, "none"), 1000, long_prompts=False).sub_prompts
    return list(part.windows[0].ids[1 : 1 + part.n_tokens])


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"][:20]))
def test_ids_equal_those_of_an_independent_tokenizer(tokenizer: CLIPTokenizer, case: dict[str, Any]) -> None:
    assert ids_of(tokenizer, case["text"]) == case.get("ours", case["open_clip"])
    assert ("ours" in case) == ("why" in case)


def test_most_texts_give_the_same_ids() -> None:
    assert len(CASES) >= 50
    assert sum("ours" not in case for case in CASES) >= 40


def test_a_prompt_is_padded_with_end_tokens(tokenizer: CLIPTokenizer) -> None:
    (part,) = tokenize_prompt(tokenizer, parse_prompt("a cat", "none"), 77, long_prompts=False).sub_prompts
    (piece,) = part.windows
    assert piece.ids == (49406, 320, 2368, *[49407] * 74)


# Text typed on Chinese, Japanese and Korean keyboards, and the result of ftfy 6.3's fix_text.
NORMAL_WIDTH = {
    "a:\uff11 b\uff1a1\uff0cc": "a:1 b:1,c",
    "\uff21\uff22\uff23\u3000\uff58\uff59\uff5a": "ABC xyz",
    "\uff08red\uff1a1.2\uff09\uff01\uff1f": "(red:1.2)!?",
    "\uffe5100 \uffe15 \uff5e": "¥100 £5 ~",
    "\uff76\uff9e\uff97\uff7d \uff8a\uff9f\uff9d\uff61": "\u30ac\u30e9\u30b9 \u30d1\u30f3\u3002",
    "\uffa1 \uffe9": "\u1100 \u2190",
    "é e\u0301": "é é",
    "\uff1ccat\uff1e": "<cat>",
}


@pytest.mark.parametrize("text", NORMAL_WIDTH)
def test_full_width_characters_equal_normal_width(tokenizer: CLIPTokenizer, text: str) -> None:
    assert ids_of(tokenizer, text) == ids_of(tokenizer, NORMAL_WIDTH[text])


def test_weights_are_read_from_the_prompt_as_written(tokenizer: CLIPTokenizer) -> None:
    """tiny-stable-diffusion parses weights before its tokenizer folds widths: only an ASCII colon makes one."""
    parts = tokenize_prompt(tokenizer, parse_prompt("a:\uff11 b\uff1a1\uff0cc"), 77, long_prompts=False).sub_prompts
    plain = tokenize_prompt(tokenizer, parse_prompt("a:1 b\\:1,c"), 77, long_prompts=False).sub_prompts
    assert [(part.weight, part.windows) for part in parts] == [(part.weight, part.windows) for part in plain]
    assert len(parts) == 2


def test_an_added_token_in_full_width_stays_one_token(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "added_tokens.json").write_text(
        json.dumps({"\uff1c\u732b\uff1e": VOCAB_SIZE}), encoding="utf-8"
    )
    tokenizer = read_tokenizer(tmp_path / "tokenizer")
    assert ids_of(tokenizer, "\uff41 \uff1c\u732b\uff1e") == [*ids_of(tokenizer, "a"), VOCAB_SIZE]
