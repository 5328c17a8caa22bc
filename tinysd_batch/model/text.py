"""Prompts to text embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tinysd_batch.model.prompts import parse_weighted


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt's embedding and what of it the text encoder saw."""

    embedding: Tensor  # [T, D]
    n_tokens: int  # without begin and end tokens, over all weighted parts
    truncated: str | None  # text beyond the token limit


def tokenize(tokenizer: CLIPTokenizer, text: str, max_tokens: int) -> tuple[list[int], int, str | None]:
    """Padded ids [T], the number of tokens the text has, and its tail that did not fit."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    room = max_tokens - 2
    kept, rest = ids[:room], ids[room:]
    padded = [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id]
    padded += [tokenizer.pad_token_id] * (max_tokens - len(padded))
    return padded, len(ids), (tokenizer.decode(rest).strip() or None) if rest else None


def encode_prompts(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: Sequence[str], max_tokens: int, device: torch.device
) -> dict[str, EncodedPrompt]:
    """Each distinct prompt's embedding. Weighted parts are encoded alone and averaged by weight, as in the origin."""
    encoded: dict[str, Tensor] = {}

    def encode(text: str) -> tuple[Tensor, int, str | None]:
        ids, count, rest = tokenize(tokenizer, text, max_tokens)
        if text not in encoded:
            encoded[text] = encoder(torch.tensor([ids], device=device)).last_hidden_state[0].float()
        return encoded[text], count, rest

    result = {}
    for prompt in dict.fromkeys(prompts):
        parts = [(weight, *encode(text)) for text, weight in parse_weighted(prompt)]
        embedding = torch.stack([weight * embedding for weight, embedding, _, _ in parts]).sum(dim=0)
        truncated = " … ".join(rest for _, _, _, rest in parts if rest)
        result[prompt] = EncodedPrompt(embedding, sum(count for _, _, count, _ in parts), truncated or None)
    return result
