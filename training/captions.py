"""The words a picture is trained with, and the small tokenizer made from them."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.data import Picture

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 2400

# Users type no style word, so a third of the captions has none.
WITH_STYLE = 2 / 3
EMPTY = 0.1  # classifier-free guidance needs the empty prompt (Ho & Salimans 2021, section 3)
ARTICLES = ("a {}", "an emoji of a {}", "a picture of a {}", "a drawing of a {}", "{} emoji", "the {}")


def words_for(picture: Picture, random: random.Random) -> str:
    draw = random.random()
    if draw < 0.60 or not picture.tags:
        return picture.concept
    if draw < 0.78:
        return random.choice(ARTICLES).format(picture.concept)
    tags = random.sample(picture.tags, k=min(len(picture.tags), random.choice((1, 2))))
    return ", ".join([picture.concept, *tags] if draw < 0.92 else tags)


def caption(picture: Picture, random: random.Random) -> str:
    """A random caption of the picture, empty one time in ten."""
    if random.random() < EMPTY:
        return ""
    words = words_for(picture, random)
    return f"{words}, {picture.style} style" if random.random() < WITH_STYLE else words


def train_tokenizer(pictures: list[Picture], folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`: CLIP's byte-level BPE (Radford et al. 2021) over our captions only.

    The vocabulary holds every byte, alone and as the end of a word, so no prompt is ever unknown.
    """
    draw = random.Random(0)
    texts = [caption(p, draw) for p in pictures for _ in range(40)]
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
    names = [BOS, EOS, *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
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
