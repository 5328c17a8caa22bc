"""Encode prompts to text embeddings."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from tinysd_batch.records import ImageRequest
from tinysd_batch.settings.schema import ImageSettings

MAX_CACHED_WINDOWS = 128  # 30 MB of host memory at SD v1's sizes

WindowKey = tuple[tuple[int, ...], int]  # token ids, clip_skip


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What guides the denoising of one image. Embeddings [T, D], float32, on the host; long prompts have a larger T."""

    embedding: Tensor
    negative_embedding: Tensor | None  # None without guidance
    scale: float
    tokens: TokenizedPrompt | None  # None if an embedding was given instead of a prompt
    negative_tokens: TokenizedPrompt | None

    @property
    def batch_key(self) -> tuple[int, bool]:
        """Images with equal keys can go through the UNet together. Padding a prompt to match would change its image."""
        return len(self.embedding), self.negative_embedding is not None


class PromptEncoder:
    """Tokenizer and text encoder, with a cache of recent embeddings that avoids loading the encoder again."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        encoder: CLIPTextModel,
        max_tokens: int,
        on_device: Callable[[], AbstractContextManager[torch.device]],
    ) -> None:
        """Set up the encoder.

        Args:
            tokenizer: the model's tokenizer.
            encoder: the text encoder.
            max_tokens: tokens per window, begin and end token included.
            on_device: returns a context manager that moves the encoder to its device and yields that device.
        """
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.max_tokens = max_tokens
        self.on_device = on_device
        self.cache: OrderedDict[WindowKey, Tensor] = OrderedDict()  # embeddings [T, D], float32, host

    def encode(
        self,
        requests: Sequence[ImageRequest],
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> list[Conditioning]:
        """Encode the prompts of the images. Embeddings [B or 1, T, D] replace the texts if given."""
        tokenized = [self.tokenize(request, prompt_embeds, negative_prompt_embeds) for request in requests]
        self.encode_missing(
            (window.ids, request.settings.clip_skip)
            for request, prompts in zip(requests, tokenized, strict=True)
            for prompt in prompts
            for sub_prompt in (prompt.sub_prompts if prompt else ())
            for window in sub_prompt.windows
        )
        conditionings = [
            self.build_conditioning(
                request.settings,
                *tokens,
                select_row(prompt_embeds, row),
                select_row(negative_prompt_embeds, row) if request.settings.is_guided else None,
            )
            for row, (request, tokens) in enumerate(zip(requests, tokenized, strict=True))
        ]
        self.evict_oldest()
        return conditionings

    def tokenize(
        self, request: ImageRequest, prompt_embeds: Tensor | None, negative_prompt_embeds: Tensor | None
    ) -> tuple[TokenizedPrompt | None, TokenizedPrompt | None]:
        """Tokenize prompt and negative prompt. None stands for an embedding, and for no guidance."""
        settings = request.settings

        def tokenize_text(text: str) -> TokenizedPrompt:
            sub_prompts = parse_prompt(text, settings.prompt_syntax)
            return tokenize_prompt(self.tokenizer, sub_prompts, self.max_tokens, long_prompts=settings.long_prompts)

        has_negative_text = settings.is_guided and negative_prompt_embeds is None
        return (
            tokenize_text(request.prompt) if prompt_embeds is None else None,
            tokenize_text(settings.negative_prompt) if has_negative_text else None,
        )

    def build_conditioning(
        self,
        settings: ImageSettings,
        tokens: TokenizedPrompt | None,
        negative_tokens: TokenizedPrompt | None,
        embedding: Tensor | None,
        negative_embedding: Tensor | None,
    ) -> Conditioning:
        """Return one image's conditioning; its two embeddings are padded to the same number of windows."""
        n_windows = max(
            [prompt.n_windows for prompt in (tokens, negative_tokens) if prompt]
            + [len(given) // self.max_tokens for given in (embedding, negative_embedding) if given is not None]
        )
        if tokens is not None:
            embedding = self.embed(tokens, n_windows, settings.clip_skip)
        if negative_tokens is not None:
            negative_embedding = self.embed(negative_tokens, n_windows, settings.clip_skip)
        if embedding is None:
            raise UsageError("prompt: a text, or prompt_embeds, is needed")
        if negative_embedding is not None and negative_embedding.shape != embedding.shape:
            raise UsageError(
                f"prompt_embeds {list(embedding.shape)} and negative_prompt_embeds {list(negative_embedding.shape)} "
                f"differ in shape"
            )
        return Conditioning(embedding, negative_embedding, settings.scale, tokens, negative_tokens)

    def encode_missing(self, keys: Iterable[WindowKey]) -> None:
        """Encode windows that are not cached, one at a time, so that no embedding depends on the others.

        The empty window, which pads shorter prompts, is encoded as well.
        """
        required = dict.fromkeys(keys)
        padding = dict.fromkeys((self.empty_window.ids, clip_skip) for _, clip_skip in required)
        missing = [key for key in required | padding if key not in self.cache]
        if missing:
            with self.on_device() as device:
                for ids, clip_skip in missing:
                    with self.without_last_layers(clip_skip - 1):
                        hidden = self.encoder(torch.tensor([ids], device=device)).last_hidden_state
                    self.cache[ids, clip_skip] = hidden[0].float().cpu()

    @contextmanager
    def without_last_layers(self, count: int) -> Iterator[None]:
        """Leave out the last layers of the encoder within a `with` block; its final norm stays."""
        transformer = self.encoder.encoder
        layers = transformer.layers
        transformer.layers = layers[: len(layers) - count]
        try:
            yield
        finally:
            transformer.layers = layers

    def embed(self, prompt: TokenizedPrompt, n_windows: int, clip_skip: int) -> Tensor:
        """Return a prompt's embedding [n_windows * T, D], float32, from cached windows.

        Shorter prompts are padded with empty windows.
        """
        embeddings = [sub.weight * self.embed_sub_prompt(sub, n_windows, clip_skip) for sub in prompt.sub_prompts]
        return torch.stack(embeddings).sum(dim=0)

    def embed_sub_prompt(self, sub_prompt: TokenizedSubPrompt, n_windows: int, clip_skip: int) -> Tensor:
        padded = [*sub_prompt.windows, *[self.empty_window] * (n_windows - len(sub_prompt.windows))]
        return torch.cat([self.apply_emphasis(window, clip_skip) for window in padded])

    def apply_emphasis(self, window: TokenWindow, clip_skip: int) -> Tensor:
        """Return a window's embedding [T, D], its tokens multiplied by their emphasis and rescaled to the old mean.

        AUTOMATIC1111's web UI does the same, and people tune their prompts for it.
        """
        key = window.ids, clip_skip
        self.cache.move_to_end(key)
        embedding = self.cache[key]
        if all(factor == 1 for factor in window.emphasis):
            return embedding
        emphasized = embedding * torch.tensor(window.emphasis)[:, None]
        mean = emphasized.mean()
        return emphasized * (embedding.mean() / mean) if mean.abs() > 1e-9 else emphasized

    def evict_oldest(self) -> None:
        """Keep the most recently used windows."""
        while len(self.cache) > MAX_CACHED_WINDOWS:
            self.cache.popitem(last=False)

    @property
    def empty_window(self) -> TokenWindow:
        return build_empty_window(self.tokenizer, self.max_tokens)


def select_row(embeddings: Tensor | None, row: int) -> Tensor | None:
    """Return row [T, D] of embeddings [B, T, D]; [1, T, D] stands for all rows."""
    return None if embeddings is None else embeddings[row if len(embeddings) > 1 else 0].float().cpu()
