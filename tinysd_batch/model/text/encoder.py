"""Prompts to text embeddings."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tinysd_batch.errors import UsageError
from tinysd_batch.model.text.prompt_syntax import parse_prompt
from tinysd_batch.model.text.tokenizer import (
    TokenizedPrompt,
    TokenizedSubPrompt,
    TokenWindow,
    build_empty_window,
    tokenize_prompt,
)

MAX_CACHED_WINDOWS = 128  # pieces: 30 MB of host memory at SD v1's sizes

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What guides the denoising of an image. Embeddings are [T, D], float32, host; long prompts have a longer T."""

    text: Tensor
    negative_embedding: Tensor | None  # None without guidance
    scale: float
    tokens: TokenizedPrompt | None  # None where an embedding was given in place of a prompt
    negative_tokens: TokenizedPrompt | None

    @property
    def batch_key(self) -> tuple[int, bool]:
        """Images of one kind can go through the UNet together. Filling a prompt up would change its picture."""
        return len(self.text), self.negative_embedding is not None


class PromptEncoder:
    """Tokenizer and text encoder. Remembers what it encoded last, so that the encoder need not come for it again."""

    def __init__(
        self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, max_tokens: int,
        on_device: Callable[[], AbstractContextManager[torch.device]],
    ) -> None:  # fmt: skip
        """`on_device` brings the encoder to its device, which it returns, for the time of a `with`."""
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.max_tokens = max_tokens
        self.on_device = on_device
        self.cache: OrderedDict[TokenIds, Tensor] = (
            OrderedDict()
        )  # a piece's ids -> its embedding [T, D], float32, host

    def encode(
        self, prompts: Sequence[str | None], negatives: Sequence[str], scales: Sequence[float],
        syntaxes: Sequence[str], *, long_prompts: bool = False, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> list[Conditioning]:  # fmt: skip
        """Prompts to conditions, one per image. Embeddings [B or 1, T, D] may stand in place of texts."""

        def tokenize(texts: Iterable[str | None], given: Tensor | None) -> list[TokenizedPrompt | None]:
            return [
                self.tokenize(text, syntax, long_prompts=long_prompts) if text is not None and given is None else None
                for text, syntax in zip(texts, syntaxes, strict=True)
            ]

        guiding = [text if scale != 1 else None for text, scale in zip(negatives, scales, strict=True)]
        read, read_negative = tokenize(prompts, prompt_embeds), tokenize(guiding, negative_prompt_embeds)
        self.encode_missing([prompt for prompt in [*read, *read_negative] if prompt])
        conditions = [
            self.build_conditioning(
                one,
                other,
                scale,
                select_row(prompt_embeds, row),
                select_row(negative_prompt_embeds, row) if scale != 1 else None,
            )
            for row, (one, other, scale) in enumerate(zip(read, read_negative, scales, strict=True))
        ]
        self.evict_oldest()
        return conditions

    def tokenize(self, prompt: str, syntax: str, *, long_prompts: bool) -> TokenizedPrompt:
        return tokenize_prompt(self.tokenizer, parse_prompt(prompt, syntax), self.max_tokens, long_prompts=long_prompts)

    def build_conditioning(
        self, tokens: TokenizedPrompt | None, negative: TokenizedPrompt | None, scale: float,
        embedding: Tensor | None, negative_embedding: Tensor | None,
    ) -> Conditioning:  # fmt: skip
        """An image's condition, its two embeddings filled up to the same number of pieces."""
        pieces = max(
            [prompt.n_windows for prompt in (tokens, negative) if prompt]
            + [len(given) // self.max_tokens for given in (embedding, negative_embedding) if given is not None]
        )
        text = embedding if tokens is None else self.embed(tokens, pieces)
        without = negative_embedding if negative is None else self.embed(negative, pieces)
        if text is None:
            raise UsageError("prompt: a text, or prompt_embeds, is needed")
        if without is not None and without.shape != text.shape:
            raise UsageError(
                f"prompt_embeds {list(text.shape)} and negative_prompt_embeds {list(without.shape)} differ"
            )
        return Conditioning(text, without, scale, tokens, negative)

    def encode_missing(self, prompts: Iterable[TokenizedPrompt]) -> None:
        """Encode what is new, a piece at a time, so that no embedding depends on its company."""
        wanted = [piece.ids for prompt in prompts for part in prompt.sub_prompts for piece in part.windows]
        missing = [ids for ids in dict.fromkeys([*wanted, self.empty_window.ids]) if ids not in self.cache]
        if missing:
            with self.on_device() as device:
                for ids in missing:
                    hidden = self.encoder(torch.tensor([ids], device=device)).last_hidden_state
                    self.cache[ids] = hidden[0].float().cpu()

    def embed(self, prompt: TokenizedPrompt, n_pieces: int) -> Tensor:
        """[n_pieces * T, D], float32, from pieces that were learnt. Shorter prompts are filled up with empty pieces."""
        return torch.stack([part.weight * self.embed_sub_prompt(part, n_pieces) for part in prompt.sub_prompts]).sum(
            dim=0
        )

    def embed_sub_prompt(self, part: TokenizedSubPrompt, n_pieces: int) -> Tensor:
        filled = [*part.windows, *[self.empty_window] * (n_pieces - len(part.windows))]
        return torch.cat([self.apply_emphasis(piece) for piece in filled])

    def apply_emphasis(self, piece: TokenWindow) -> Tensor:
        """A piece's embedding [T, D], its tokens multiplied by their emphasis and the whole brought back to its mean.

        That is how AUTOMATIC1111's web UI does it, for whose numbers people's prompts are tuned.
        """
        self.cache.move_to_end(piece.ids)
        embedding = self.cache[piece.ids]
        if all(factor == 1 for factor in piece.emphasis):
            return embedding
        changed = embedding * torch.tensor(piece.emphasis)[:, None]
        mean = changed.mean()
        return changed * (embedding.mean() / mean) if mean.abs() > 1e-9 else changed

    def evict_oldest(self) -> None:
        """Keep the pieces that were used last."""
        while len(self.cache) > MAX_CACHED_WINDOWS:
            self.cache.popitem(last=False)

    @property
    def empty_window(self) -> TokenWindow:
        return build_empty_window(self.tokenizer, self.max_tokens)


def select_row(embeddings: Tensor | None, row: int) -> Tensor | None:
    """[T, D] of embeddings [B, T, D], or [1, T, D] for all rows."""
    return None if embeddings is None else embeddings[row if len(embeddings) > 1 else 0].float().cpu()
