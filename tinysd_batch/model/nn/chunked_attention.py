"""Run the UNet's transformer blocks in chunks: feed-forward layers by tokens, attention by queries."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tinysd_batch.model.chunking import items_per_chunk

HEAD_WIDTHS = (40, 80, 160, 512)  # of SD v1: three in the UNet, one in the VAE


class ChunkedFeedForward(nn.Module):
    """diffusers' feed-forward layers on a chunk of tokens at a time: the widest activation is 8 times the input."""

    def __init__(self, net: nn.ModuleList, features: int) -> None:
        super().__init__()
        self.net = net
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, C] to [B, T, C]."""
        tokens = x.flatten(0, 1)  # its chunks are contiguous, which makes matrix products faster
        chunks = torch.split(tokens, items_per_chunk(len(tokens), self.features * x.element_size()))
        if len(chunks) == 1:
            return self.run_layers(x)
        return torch.cat([self.run_layers(chunk) for chunk in chunks]).view_as(x)

    def run_layers(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class ChunkedAttnProcessor:
    """Attention processor for diffusers that never holds all scores: with torch's fused kernels, or in query chunks."""

    def __init__(self, *, fused: bool) -> None:
        self.fused = fused

    def __call__(
        self,
        layer: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,  # noqa: ARG002 - diffusers inspects the signature
        temb: None = None,  # noqa: ARG002
    ) -> Tensor:
        """Map [B, T, C], or [B, C, H, W], to the same shape; keys and values from `encoder_hidden_states` if given."""
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        if layer.group_norm is not None:
            x = layer.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(states).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for project, states in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))
        )
        del x, context
        out = layer.to_out[0](self.attend(query, key, value).transpose(1, 2).flatten(2))
        del query, key, value
        if hidden_states.dim() == 4:
            out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if layer.residual_connection:
            out = out + hidden_states
        return torch.as_tensor(out if layer.rescale_output_factor == 1 else out / layer.rescale_output_factor)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention; all tensors are [B, heads, T, C / heads]."""
        if not self.fused:
            batch, heads, tokens = query.shape[:3]
            rows = items_per_chunk(tokens, batch * heads * key.shape[2] * 4)
            chunks = torch.split(query, rows, dim=2)
            return torch.cat([compute_attention(chunk, key, value) for chunk in chunks], dim=2)
        if query.is_meta:  # torch has no fused kernel there, and all scores would be counted
            return torch.empty_like(query)
        return F.scaled_dot_product_attention(query, key, value)


def compute_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d)) V with the softmax in float32 (Vaswani et al. 2017, equation 1)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value)


def has_fused_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch computes attention on this device without holding all scores."""
    if device.type != "cuda" or not torch.cuda.is_available():  # assume it when planning without the GPU
        return True
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    for width in HEAD_WIDTHS:
        x = torch.empty(1, 1, 64, width, dtype=dtype, device=device)
        params = SDPAParams(x, x, x, None, 0.0, False, False)
        if not (can_use_flash_attention(params) or can_use_efficient_attention(params)):
            return False
    return True


def use_chunked_layers(unet: UNet2DConditionModel, vae: AutoencoderKL, *, fused: bool) -> ChunkedAttnProcessor:
    """Let attention and feed-forward layers work in chunks. Returns the attention processor."""
    processor = ChunkedAttnProcessor(fused=fused)
    for model in (unet, vae):
        model.set_attn_processor(processor)
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            inner = module.ff.net[0].proj
            module.ff = ChunkedFeedForward(module.ff.net, inner.out_features)
    return processor
