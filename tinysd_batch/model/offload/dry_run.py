"""Run all components of a model once on the meta device, which computes shapes only."""

import torch

from tinysd_batch.model.nn.unet import run_unet
from tinysd_batch.model.nn.vae_decoder import decode_single
from tinysd_batch.model.offload.planned_model import PlannedModel


def dry_run(model: PlannedModel) -> None:
    """Run every component once, so that the call order of its layers can be traced."""
    with torch.device("meta"):
        text = model.text_encoder(torch.zeros(1, model.info.max_tokens, dtype=torch.long)).last_hidden_state
        side = model.info.size_multiple_px // model.info.vae_scale_factor
        latents = torch.empty(1, model.info.latent_channels, side, side)
        model.precomputed.use_meta_tensors(1, text.shape[1], latents.dtype)
        noise = run_unet(model.unet, latents, torch.zeros(1, dtype=torch.long), None, latents.dtype)
        decode_single(model.vae, noise)
        model.precomputed.forget()  # otherwise later stages would count the meta tensors as live
