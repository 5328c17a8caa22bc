"""Captions for training, and a small tokenizer built from them."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.data import Emoji

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 2400

# Most users type no style word, so a third of the captions have none.
WITH_STYLE = 2 / 3
EMPTY = 0.1  # share of empty captions, which classifier-free guidance needs (Ho & Salimans 2021, section 3)
ARTICLES = ("a {}", "an emoji of a {}", "a picture of a {}", "a drawing of a {}", "{} emoji", "the {}")


def choose_words(emoji: Emoji, rng: random.Random) -> str:
    """Choose the concept, alone or with an article, or with tags, or tags alone."""
    choice = rng.random()
    if choice < 0.60 or not emoji.tags:
        return emoji.concept
    if choice < 0.78:
        return rng.choice(ARTICLES).format(emoji.concept)
    tags = rng.sample(emoji.tags, k=min(len(emoji.tags), rng.choice((1, 2))))
    return ", ".join([emoji.concept, *tags] if choice < 0.92 else tags)


def make_caption(emoji: Emoji, rng: random.Random) -> str:
    """Make a random caption, which is empty one time in ten."""
    if rng.random() < EMPTY:
        return ""
    words = choose_words(emoji, rng)
    return f"{words}, {emoji.style} style" if rng.random() < WITH_STYLE else words


def train_tokenizer(emojis: list[Emoji], folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`: CLIP's byte-level BPE (Radford et al. 2021), trained on our captions only.

    The vocabulary holds every byte, alone and as the end of a word, so that every prompt can be encoded.
    """
    rng = random.Random(0)
    texts = [make_caption(emoji, rng) for emoji in emojis for _ in range(40)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [BOS, EOS, *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=EOS,
        model_max_length=MAX_TOKENS,
    )
