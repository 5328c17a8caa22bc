"""All parts of a model at work once on the meta device, which only counts shapes."""

import torch

from tinysd_batch.model.nn.unet import predict
from tinysd_batch.model.nn.vae_decoder import decode_one
from tinysd_batch.model.offload.planned_model import PlannedModel


def rehearse(model: PlannedModel) -> None:
    """Run every part once, so that the order in which layers are used can be observed."""
    with torch.device("meta"):
        text = model.text_encoder(torch.zeros(1, model.info.max_tokens, dtype=torch.long)).last_hidden_state
        side = model.info.step_px // model.info.factor
        latents = torch.empty(1, model.info.channels, side, side)
        model.hoisted.pretend(1, text.shape[1], latents.dtype)
        noise = predict(model.unet, latents, torch.zeros(1, dtype=torch.long), None, latents.dtype)
        decode_one(model.vae, noise)
        model.hoisted.forget()  # else the next phases would seem to hold what was only pretended
