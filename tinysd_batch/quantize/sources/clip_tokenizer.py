"""Write CLIP's tokenizer, which no SD v1 checkpoint contains.

Its merges ship with the package, and everything else follows from them: `clip_merges.txt.gz` has the 48,894 merges of
openai/clip-vit-large-patch14, one per line, in order. A token is a byte, a byte at the end of a word, a merge, or one
of two special tokens; its id is its position in that order.
"""

import gzip
import json
from importlib.resources import files
from pathlib import Path

VOCAB_SIZE = 49_408
BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
MERGES_HEADER = "#version: 0.2"
END_OF_WORD = "</w>"
# One character per byte: printable bytes are themselves, the others are mapped behind Latin-1 (as in GPT-2).
BYTE_CHARACTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]


def read_merges() -> list[str]:
    """Return the merges, each two tokens separated by a space, most frequent first."""
    packed = (files("tinysd_batch.quantize.sources") / "clip_merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8").splitlines()


def build_vocabulary(merges: list[str]) -> dict[str, int]:
    """Map each token to its id."""
    tokens = [
        *BYTE_CHARACTERS,
        *(character + END_OF_WORD for character in BYTE_CHARACTERS),
        *(merge.replace(" ", "") for merge in merges),
        BOS_TOKEN,
        EOS_TOKEN,
    ]
    return {token: token_id for token_id, token in enumerate(tokens)}


def write_clip_tokenizer(folder: Path, max_tokens: int) -> None:
    """Write `vocab.json`, `merges.txt` and `tokenizer_config.json` for transformers' CLIPTokenizer."""
    merges = read_merges()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_tokens,
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "unk_token": EOS_TOKEN,
    }
    folder.mkdir(parents=True)
    content = {
        "vocab.json": json.dumps(build_vocabulary(merges), ensure_ascii=False),
        "merges.txt": "\n".join([MERGES_HEADER, *merges]),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in content.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
