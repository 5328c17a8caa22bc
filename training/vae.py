"""Train the VAE: images of 64x64 pixels to latents of 16x16x4 and back.

Two stages: `train` trains encoder and decoder together; `finish_decoder` then freezes the encoder, because the latents
that the UNet learns from must not change, and continues with the decoder alone.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training import checkpoints, cpu, data

CROP_PX = 32
CROP_SHARE = 0.6
KL_WEIGHT = 3e-4
LATENT_NOISE = 0.05  # makes the decoder robust to small errors of the UNet


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=data.IMAGE_PX,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Compute L1 + half of the squared error + half of the L1 of image gradients, which keeps edges sharp."""
    dx = (output.diff(dim=3) - target.diff(dim=3)).abs().mean()
    dy = (output.diff(dim=2) - target.diff(dim=2)).abs().mean()
    return F.l1_loss(output, target) + 0.5 * F.mse_loss(output, target) + 0.5 * (dx + dy)


def compute_psnr_db(output: Tensor, target: Tensor) -> float:
    """Compute the peak signal-to-noise ratio in dB of images in -1..1."""
    return float(-10 * torch.log10(((output.clamp(-1, 1) - target) / 2).square().mean()))


def sample_batch(images: Tensor, batch_size: int) -> Tensor:
    """Return whole images, or crops that are not blank."""
    batch = images[torch.randint(len(images), (batch_size,))]
    if torch.rand(()) > CROP_SHARE:
        return batch[: batch_size // 4]
    x, y = (int(offset) for offset in torch.randint(data.IMAGE_PX - CROP_PX, (2,)))
    crops = batch[:, :, y : y + CROP_PX, x : x + CROP_PX]
    not_blank = crops[crops.amin(dim=(1, 2, 3)) < 0.8]
    return not_blank if len(not_blank) else crops


def train(folder: Path, minutes: float, batch_size: int = 8, learning_rate: float = 1.2e-3) -> None:
    """Train encoder and decoder for this many minutes (the schedule follows the clock), and write `vae_frozen.pt`."""
    images = to_tensor(data.read_dataset(folder)[0])
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    started_at, step, spent_min = time.monotonic(), 0, 0.0
    if state := checkpoints.load(folder / "vae.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        spent_min, step = state["spent_min"], state["step"]
    while (progress := (spent_min + (time.monotonic() - started_at) / 60) / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100, 4 * (1 - progress) + 0.02)
        batch = sample_batch(images, batch_size)
        with cpu.mixed_precision():
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output.float(), batch) + KL_WEIGHT * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            with torch.no_grad():
                some_images = images[::40]
                psnr_db = compute_psnr_db(vae.decode(vae.encode(some_images).latent_dist.mode()).sample, some_images)
            print(f"vae step {step}  {progress:.0%}  loss {loss.item():.4f}  PSNR {psnr_db:.1f} dB", flush=True)
            state = {
                "vae": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent_min": spent_min + (time.monotonic() - started_at) / 60,
            }
            checkpoints.save(state, folder / "vae.pt")
    standardize_latents(vae, images)
    checkpoints.save({"vae": vae.state_dict()}, folder / "vae_frozen.pt")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images to posterior means, [N, 4, 16, 16]."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(64)])


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold the latents' mean and standard deviation per channel into the 1x1 convolutions around them.

    Stable Diffusion's pipeline has a scale but no shift, and its schedule keeps 7 % of the signal at the last timestep:
    the mean of latents that are not centred would be missing from the noise that generation starts with.
    """
    latents = encode(vae, images)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    moments, inverse = vae.quant_conv, vae.post_quant_conv  # [8, 8, 1, 1]: means, then log-variances; [4, 4, 1, 1]
    inverse.bias += (inverse.weight[:, :, 0, 0] @ mean[:, None])[:, 0]
    inverse.weight *= std[None, :, None, None]
    moments.weight[:4] /= std[:, None, None, None]
    moments.bias[:4] = (moments.bias[:4] - mean) / std
    moments.bias[4:] -= 2 * std.log()


def read_frozen(folder: Path) -> AutoencoderKL:
    vae = build_vae()
    state = checkpoints.load(folder / "vae_frozen.pt")
    assert state is not None, "train the autoencoder first"
    vae.load_state_dict(state["vae"])
    return vae.requires_grad_(False)


def finish_decoder(folder: Path, minutes: float, batch_size: int = 4, learning_rate: float = 6e-4) -> None:
    """Train the decoder alone, on fixed latents with a little noise, and write `decoder_done.pt`."""
    images = to_tensor(data.read_dataset(folder)[0])
    vae = read_frozen(folder).to(memory_format=torch.channels_last)
    latents = encode(vae, images)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    started_at, step, spent_min = time.monotonic(), 0, 0.0
    if state := checkpoints.load(folder / "decoder.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        spent_min, step = state["spent_min"], state["step"]
    while (progress := (spent_min + (time.monotonic() - started_at) / 60) / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50, 3 * (1 - progress) + 0.02)
        rows = torch.randint(len(images), (batch_size,))
        noisy = latents[rows] + LATENT_NOISE * torch.rand(batch_size, 1, 1, 1) * torch.randn(batch_size, 4, 16, 16)
        with cpu.mixed_precision():
            output = vae.decode(noisy).sample
        loss = reconstruction_loss(output.float(), images[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            with torch.no_grad():
                psnr_db = compute_psnr_db(vae.decode(latents[::40]).sample, images[::40])
            print(f"decoder step {step}  {progress:.0%}  loss {loss.item():.4f}  PSNR {psnr_db:.1f} dB", flush=True)
            state = {
                "vae": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent_min": spent_min + (time.monotonic() - started_at) / 60,
            }
            checkpoints.save(state, folder / "decoder.pt")
    checkpoints.save({"vae": vae.state_dict()}, folder / "decoder_done.pt")
