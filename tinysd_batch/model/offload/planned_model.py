"""What planning needs of a model: a Protocol, so that the planner does not import the pipeline that uses it."""

from typing import Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from tinysd_batch.model.checkpoint.info import ModelInfo
from tinysd_batch.model.nn.chunked_attention import ChunkedAttnProcessor
from tinysd_batch.model.offload.components import Component
from tinysd_batch.model.offload.offloader import Offloader
from tinysd_batch.model.offload.precompute import PrecomputedLayers


class PlannedModel(Protocol):
    """A model's components and device; `TinySD` implements it."""

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    unet_bs: int | None  # rows that go through the UNet at once; None: all
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_fragment: Component
    encode_fragment: Component
    decode_fragment: Component
    vae_fragment: Component
    attention: ChunkedAttnProcessor
    offloader: Offloader
    precomputed: PrecomputedLayers
