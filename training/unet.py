"""Train UNet and text encoder together on the latents of the frozen encoder.

`--processes N` runs N single-threaded processes whose weights are averaged every few steps (local SGD, Stich 2019). On
a shared machine that is several times faster than one process with N threads, which synchronizes at every operation.
"""

import json
import random
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import captions, checkpoints, cpu, data, vae

TEXT_WIDTH = 256
AVERAGE_EVERY = 8
BATCH = 32
LEARNING_RATE = 1e-3
EMA = 0.99
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion v1's


def build_unet() -> UNet2DConditionModel:
    """Build a UNet of 14.9 M weights, with attention on the two inner levels only, where it is cheap on a CPU."""
    return UNet2DConditionModel(
        sample_size=data.IMAGE_PX // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 96, 256),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=captions.MAX_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def compute_loss_weights() -> Tensor:
    """Compute (min(SNR, 5) + 1) / SNR per timestep, [1000], capped and scaled to mean 1.

    This is Min-SNR (Hang et al. 2023) with the weights of v-prediction. With plain Min-SNR, epsilon prediction learned
    right shapes in wrong colours, because colour is decided at noise levels that it weights little.
    """
    alphas = DDPMScheduler(**BETAS).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = ((snr.clamp(max=5) + 1) / snr).clamp(max=60)
    return weights / weights.mean()


def compute_learning_rate(progress: float, step: int) -> float:
    """Warm up, stay constant, then decay over the last 30 %, so that the number of samples may still be changed."""
    return LEARNING_RATE * min((step + 1) / 200, 1.0, (1 - progress) / 0.3 + 0.01)


@torch.no_grad()
def average_weights(model: nn.Module, processes: int) -> None:
    if processes > 1:
        flat = nn.utils.parameters_to_vector(model.parameters())
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / processes, model.parameters())


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)


def read_training_set(folder: Path, frozen_vae: vae.AutoencoderKL) -> tuple[Tensor, list[data.Emoji]]:
    """Read the latents [N, 4, 16, 16] and the words of all emoji that are not held out."""
    images, emojis = data.read_dataset(folder)
    latents = vae.encode(frozen_vae, vae.to_tensor(images))
    trained = [index for index, emoji in enumerate(emojis) if not emoji.held_out]
    return latents[trained], [emojis[index] for index in trained]


def sample_batch(
    latents: Tensor, emojis: list[data.Emoji], rows: list[int], tokenizer: CLIPTokenizer, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return the latents [B, 4, 16, 16] of the rows, and the tokens [B, T] of a random caption for each."""
    texts = [captions.make_caption(emojis[row], rng) for row in rows]
    return latents[rows], tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_process(rank: int, processes: int, folder: Path, samples: int, rendezvous: str) -> None:  # noqa: C901 - one training loop
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    latents, emojis = read_training_set(folder, vae.read_frozen(folder))
    tokenizer = captions.read_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    unet, text = build_unet(), build_text_encoder(len(tokenizer))
    unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on CPU
    model = nn.ModuleDict({"unet": unet, "text": text})
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    seen, step = 0, 0
    if state := checkpoints.load(folder / "unet.pt"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, seen, step = state["ema"], state["seen"], state["step"]
    torch.manual_seed(1000 * step + rank)
    rng = random.Random(1000 * step + rank)
    noise_schedule, weights = DDPMScheduler(**BETAS), compute_loss_weights()
    started_at, seen_before, mean_loss = time.monotonic(), seen, 0.0
    order: list[int] = []
    while seen < samples:
        if len(order) < BATCH:
            order += torch.randperm(len(emojis)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        clean, tokens = sample_batch(latents, emojis, rows, tokenizer, rng)
        noise = torch.randn(BATCH, *latents.shape[1:])
        timesteps = torch.randint(1000, (BATCH,))
        noisy = noise_schedule.add_noise(clean, noise, timesteps)
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(seen / samples, step)
        with cpu.mixed_precision():
            context = text(tokens).last_hidden_state
            predicted = unet(noisy, timesteps, context).sample
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (errors * weights[timesteps]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen += BATCH * processes
        mean_loss = 0.98 * mean_loss + 0.02 * loss.item() if mean_loss else loss.item()
        if step % AVERAGE_EVERY == 0:
            average_weights(model, processes)
            decay = min(EMA**AVERAGE_EVERY, (1 + step) / (10 + step))
            update_ema(ema, model, decay)
        if rank == 0 and step % 100 == 0:
            rate = (seen - seen_before) / (time.monotonic() - started_at)
            print(
                f"unet step {step}  seen {seen:,} of {samples:,}  loss {mean_loss:.4f}  {rate:.0f} images/s", flush=True
            )
            state = {
                "model": model.state_dict(),
                "ema": ema,
                "optimizer": optimizer.state_dict(),
                "seen": seen,
                "step": step,
            }
            checkpoints.save(state, folder / "unet.pt")
    if rank == 0:
        checkpoints.save({"ema": ema, "seen": seen}, folder / "unet_done.pt")
        (folder / "unet.json").write_text(json.dumps({"seen": seen, "pictures": len(emojis)}))


def train(folder: Path, samples: int, processes: int = 1) -> None:
    """Train on this many images, resuming from the last checkpoint, and write `unet_done.pt`."""
    if processes == 1:
        return train_process(0, 1, folder, samples, "")
    with tempfile.TemporaryDirectory() as scratch:
        rendezvous = str(Path(scratch) / "rendezvous")
        torch.multiprocessing.spawn(train_process, (processes, folder, samples, rendezvous), nprocs=processes)
    return None


def read_trained(folder: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Read the averaged weights of the finished training, or of the last checkpoint."""
    state = checkpoints.load(folder / "unet_done.pt") or checkpoints.load(folder / "unet.pt")
    assert state is not None, "train the UNet first"
    tokenizer = captions.read_tokenizer(folder / "tokenizer")
    model = nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(len(tokenizer))})
    model.load_state_dict(state["ema"])
    model.requires_grad_(False)
    return model["unet"], model["text"]  # type: ignore[return-value]
