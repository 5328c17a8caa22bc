"""Train UNet and text encoder together on frozen latents.

`--processes N` runs N single-threaded processes whose weights are averaged every few steps (local SGD, Stich 2019): on
a shared machine that is several times faster than one process with N threads, whose barriers wait for everybody.
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


def new_unet() -> UNet2DConditionModel:
    """14.9 M weights; attention on the two lower levels only, where it is cheap on a CPU."""
    return UNet2DConditionModel(
        sample_size=data.PICTURE_PX // 4, in_channels=4, out_channels=4,
        block_out_channels=(32, 96, 256), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, cross_attention_dim=TEXT_WIDTH,
    )  # fmt: skip


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=captions.MAX_TOKENS,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def loss_weights() -> Tensor:
    """(min(SNR, 5) + 1) / SNR per timestep, [1000], capped and scaled to mean 1.

    Min-SNR (Hang et al. 2023) with the weight of v-prediction: plain min-SNR gave epsilon prediction right shapes in
    wrong colours, since colour is decided at noise levels it hardly weighs.
    """
    alphas = DDPMScheduler(**BETAS).alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = ((snr.clamp(max=5) + 1) / snr).clamp(max=60)
    return weights / weights.mean()


def learning_rate(progress: float, step: int) -> float:
    """Warm-up, then constant, then down over the last 30 %: the end may be moved without a new start."""
    return LEARNING_RATE * min((step + 1) / 200, 1.0, (1 - progress) / 0.3 + 0.01)


@torch.no_grad()
def average(model: nn.Module, processes: int) -> None:
    if processes > 1:
        flat = nn.utils.parameters_to_vector(model.parameters())
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / processes, model.parameters())


@torch.no_grad()
def update_average(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)


def read_training_set(folder: Path, pixels: vae.AutoencoderKL) -> tuple[Tensor, list[data.Picture]]:
    images, pictures = data.read(folder)
    latents = vae.encode(pixels, vae.to_tensor(images))
    shown = [number for number, picture in enumerate(pictures) if not picture.held_out]
    return latents[shown], [pictures[number] for number in shown]


def draw_batch(
    latents: Tensor, pictures: list[data.Picture], rows: list[int], tokenizer: CLIPTokenizer, draw: random.Random
) -> tuple[Tensor, Tensor]:
    """Latents [B, 4, 16, 16] of the rows, and tokens [B, T] of a random caption for each."""
    words = [captions.caption(pictures[row], draw) for row in rows]
    return latents[rows], tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_process(rank: int, processes: int, folder: Path, samples: int, rendezvous: str) -> None:  # noqa: C901 - one loop, in one piece
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    latents, pictures = read_training_set(folder, vae.read_frozen(folder))
    tokenizer = captions.read_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    unet, text = new_unet(), new_text_encoder(len(tokenizer))
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
    draw = random.Random(1000 * step + rank)
    noise_schedule, weights = DDPMScheduler(**BETAS), loss_weights()
    started, seen_before, running = time.monotonic(), seen, 0.0
    order: list[int] = []
    while seen < samples:
        if len(order) < BATCH:
            order += torch.randperm(len(pictures)).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        clean, tokens = draw_batch(latents, pictures, rows, tokenizer, draw)
        noise = torch.randn(BATCH, *latents.shape[1:])
        timesteps = torch.randint(1000, (BATCH,))
        noisy = noise_schedule.add_noise(clean, noise, timesteps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen / samples, step)
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
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        if step % AVERAGE_EVERY == 0:
            average(model, processes)
            decay = min(EMA**AVERAGE_EVERY, (1 + step) / (10 + step))
            update_average(ema, model, decay)
        if rank == 0 and step % 100 == 0:
            rate = (seen - seen_before) / (time.monotonic() - started)
            print(
                f"unet step {step}  seen {seen:,} of {samples:,}  loss {running:.4f}  {rate:.0f} pictures/s", flush=True
            )
            checkpoints.save(
                {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(),
                 "seen": seen, "step": step}, folder / "unet.pt",
            )  # fmt: skip
    if rank == 0:
        checkpoints.save({"ema": ema, "seen": seen}, folder / "unet_done.pt")
        (folder / "unet.json").write_text(json.dumps({"seen": seen, "pictures": len(pictures)}))


def train(folder: Path, samples: int, processes: int = 1) -> None:
    """Train until so many pictures were seen, going on from the last save; leaves `unet_done.pt`."""
    if processes == 1:
        return train_process(0, 1, folder, samples, "")
    with tempfile.TemporaryDirectory() as scratch:
        rendezvous = str(Path(scratch) / "rendezvous")
        torch.multiprocessing.spawn(train_process, (processes, folder, samples, rendezvous), nprocs=processes)
    return None


def read_trained(folder: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The averaged weights: of the end where training is done, of the last save where it is not."""
    state = checkpoints.load(folder / "unet_done.pt") or checkpoints.load(folder / "unet.pt")
    assert state is not None, "train the UNet first"
    tokenizer = captions.read_tokenizer(folder / "tokenizer")
    model = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(len(tokenizer))})
    model.load_state_dict(state["ema"])
    model.requires_grad_(False)
    return model["unet"], model["text"]  # type: ignore[return-value]
