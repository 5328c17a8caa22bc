"""Quantization-aware finish: tune the 2-bit UNet to say what the float UNet says.

Each packed layer keeps a float weight, and a scale and offset per group; the forward pass uses the quantized weight,
the backward pass goes straight through the rounding (learned step size quantization, Esser et al. 2020). The target is
the float model's noise prediction, which carries no noise of its own: minutes repair most of what 2 bits cost.
"""

import copy
import math
import random
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinysd_batch.model.packing import PackedWeight, to_matrix
from tinysd_batch.quantize.affine import fit_groups, pack_matrix, top_code
from tinysd_batch.quantize.presets import layers_to_pack
from training import captions, checkpoints, cpu, unet, vae

BATCH = 32
WEIGHT_LR, GROUP_LR = 3e-4, 1e-4
DATA_SHARE = 0.1  # of the loss on true noise, beside the float model's prediction


class TwoBit(nn.Module):
    """A weight as its 2-bit self, with gradients to the weight and to its groups' scales and offsets."""

    def __init__(self, weight: Tensor, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size
        scale, offset = fit_groups(to_matrix(weight).reshape(-1, group_size))
        self.scale, self.offset = nn.Parameter(scale), nn.Parameter(offset)  # [O * G, 1]

    def forward(self, weight: Tensor) -> Tensor:
        groups = to_matrix(weight).reshape(-1, self.group_size)
        inside = ((groups - self.offset) / self.scale).clamp(0, top_code(2))
        codes = inside + (inside.round() - inside).detach()
        matrix = (codes * self.scale + self.offset).view(weight.shape[0], -1)
        if weight.dim() == 2:
            return matrix
        return matrix.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)


def make_student(teacher: nn.Module) -> nn.Module:
    student = copy.deepcopy(teacher).requires_grad_(True)
    for name, layout in layers_to_pack(teacher, "tiny").items():
        layer = student.get_submodule(name)
        parametrize.register_parametrization(layer, "weight", TwoBit(layer.weight.detach(), layout.group_size))
    return student


def parameter_groups(student: nn.Module) -> list[dict]:
    of_groups = [p for name, p in student.named_parameters() if name.endswith((".scale", ".offset"))]
    ids = {id(p) for p in of_groups}
    others = [p for p in student.parameters() if id(p) not in ids]
    return [{"params": others, "base": WEIGHT_LR}, {"params": of_groups, "base": GROUP_LR}]


def train_process(rank: int, processes: int, folder: Path, samples: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    latents, pictures = unet.read_training_set(folder, vae.read_frozen(folder))
    tokenizer = captions.read_tokenizer(folder / "tokenizer")
    teacher, text = unet.read_trained(folder)
    teacher.set_attn_processor(AttnProcessor())
    student = make_student(teacher)
    optimizer = torch.optim.AdamW(parameter_groups(student), betas=(0.9, 0.99), weight_decay=0)
    seen, step = 0, 0
    if state := checkpoints.load(folder / "finish.pt"):
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        seen, step = state["seen"], state["step"]
    torch.manual_seed(5000 * step + rank)
    draw = random.Random(5000 * step + rank)
    noise_schedule, weights = DDPMScheduler(**unet.BETAS), unet.loss_weights()
    gap = 0.0
    while seen < samples:
        rows = torch.randint(len(pictures), (BATCH,)).tolist()
        clean, tokens = unet.draw_batch(latents, pictures, rows, tokenizer, draw)
        noise, timesteps = torch.randn(BATCH, *latents.shape[1:]), torch.randint(1000, (BATCH,))
        noisy = noise_schedule.add_noise(clean, noise, timesteps)
        with torch.no_grad(), cpu.mixed_precision():
            context = text(tokens).last_hidden_state
            target = teacher(noisy, timesteps, context).sample.float()
        with cpu.mixed_precision():
            predicted = student(noisy, timesteps, context).sample.float()
        weight = weights[timesteps]
        to_teacher = (F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()
        to_data = (F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 30)
            group["lr"] = group["base"] * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, seen / samples)))
        optimizer.zero_grad()
        (to_teacher + DATA_SHARE * to_data).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen += BATCH * processes
        gap = 0.95 * gap + 0.05 * to_teacher.item() if step > 1 else to_teacher.item()
        if step % unet.AVERAGE_EVERY == 0:
            unet.average(student, processes)
        if rank == 0 and step % 40 == 0:
            print(f"finish step {step}  seen {seen:,} of {samples:,}  gap to the float model {gap:.4f}", flush=True)
            checkpoints.save(
                {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "seen": seen, "step": step},
                folder / "finish.pt",
            )
    unet.average(student, processes)
    if rank == 0:
        checkpoints.save({"student": student.state_dict(), "seen": seen}, folder / "finish_done.pt")


def train(folder: Path, samples: int, processes: int = 1) -> None:
    """Tune until so many pictures were seen, going on from the last save; leaves `finish_done.pt`."""
    if processes == 1:
        return train_process(0, 1, folder, samples, "")
    with tempfile.TemporaryDirectory() as scratch:
        rendezvous = str(Path(scratch) / "rendezvous")
        torch.multiprocessing.spawn(train_process, (processes, folder, samples, rendezvous), nprocs=processes)
    return None


@torch.no_grad()
def pack(folder: Path) -> tuple[dict[str, tuple[PackedWeight, tuple[int, ...]]], dict[str, Tensor]]:
    """The finished UNet's packed layers, and its other tensors."""
    teacher, _ = unet.read_trained(folder)
    student = make_student(teacher)
    state = checkpoints.load(folder / "finish_done.pt") or checkpoints.load(folder / "finish.pt")
    assert state is not None, "run the finish first"
    student.load_state_dict(state["student"])
    packed = {}
    for name in layers_to_pack(teacher, "tiny"):
        layer = student.get_submodule(name)
        two_bit = layer.parametrizations.weight[0]
        weight = layer.parametrizations.weight.original
        rows = weight.shape[0]
        scale, offset = two_bit.scale.view(rows, -1), two_bit.offset.view(rows, -1)
        packed[name] = (pack_matrix(to_matrix(weight), scale, offset), tuple(weight.shape))
    others = {
        name: value for name, value in student.state_dict().items()
        if ".parametrizations." not in name and name.removesuffix(".weight") not in packed
    }  # fmt: skip
    return packed, others
