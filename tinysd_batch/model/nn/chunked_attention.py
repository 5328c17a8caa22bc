"""The UNet's transformers in parts: tokens through the feed-forward layers, queries through attention."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tinysd_batch.model.chunking import items_per_chunk

HEAD_WIDTHS = (40, 80, 160, 512)  # SD v1's: the UNet's three, and the autoencoder's one


class ChunkedFeedForward(nn.Module):
    """diffusers' feed-forward layers over some tokens at a time; the widest map in between is 8 times the input."""

    def __init__(self, net: nn.ModuleList, features: int) -> None:
        super().__init__()
        self.net = net
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to the same."""
        tokens = x.flatten(0, 1)  # parts of it lie in one piece: a matrix product is dearer where they do not
        parts = torch.split(tokens, items_per_chunk(len(tokens), self.features * x.element_size()))
        return torch.cat([self.part(part) for part in parts]).view_as(x) if len(parts) > 1 else self.part(x)

    def part(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class ChunkedAttnProcessor:
    """What diffusers' layers call. Never holds all scores: takes torch's fused kernels, or parts of the queries."""

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused

    def __call__(
        self, layer: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None, temb: None = None,  # noqa: ARG002 - diffusers looks for them
    ) -> Tensor:  # fmt: skip
        """[B, T, C], or a map [B, C, H, W], to the same; keys and values from `encoder_hidden_states` if given."""
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        if layer.group_norm is not None:
            x = layer.group_norm(x.transpose(1, 2)).transpose(1, 2)
        other = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(one).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for project, one in ((layer.to_q, x), (layer.to_k, other), (layer.to_v, other))
        )
        del x, other
        said = layer.to_out[0](self.attend(query, key, value).transpose(1, 2).flatten(2))
        del query, key, value
        if hidden_states.dim() == 4:
            said = said.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if layer.residual_connection:
            said = said + hidden_states
        return torch.as_tensor(said if layer.rescale_output_factor == 1 else said / layer.rescale_output_factor)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, T, C / heads] each."""
        if not self.fused:
            batch, heads, tokens = query.shape[:3]
            rows = items_per_chunk(tokens, batch * heads * key.shape[2] * 4)
            return torch.cat([compute_attention(part, key, value) for part in torch.split(query, rows, dim=2)], dim=2)
        if query.is_meta:  # there torch has no fused kernel, and would count all scores
            return torch.empty_like(query)
        return F.scaled_dot_product_attention(query, key, value)


def compute_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, the softmax in float32 (Vaswani et al. 2017, equation 1)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value)


def has_fused_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch computes attention on this device without holding all scores."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a plan for a card elsewhere hopes for the best
        return True
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    for width in HEAD_WIDTHS:
        x = torch.empty(1, 1, 64, width, dtype=dtype, device=device)
        params = SDPAParams(x, x, x, None, 0.0, False, False)
        if not (can_use_flash_attention(params) or can_use_efficient_attention(params)):
            return False
    return True


def use_chunked_layers(unet: UNet2DConditionModel, vae: AutoencoderKL, *, fused: bool) -> ChunkedAttnProcessor:
    """Have attention and feed-forward layers work in parts. Returns the processor."""
    processor = ChunkedAttnProcessor(fused=fused)
    for model in (unet, vae):
        model.set_attn_processor(processor)
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            inner = module.ff.net[0].proj
            module.ff = ChunkedFeedForward(module.ff.net, inner.out_features)
    return processor
