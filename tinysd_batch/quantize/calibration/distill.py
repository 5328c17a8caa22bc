"""Distill: keep the codes of a calibrated UNet, and train everything else to reproduce the float UNet's predictions.

Scales, offsets, biases and norms are trained by gradient descent on the float model's own trajectories, with and
without the prompt. The targets are predictions, which contain no random noise, so a few hundred small steps are enough.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.func import functional_call

from tinysd_batch.model.packed.format import from_matrix, get_scales_and_offsets, unpack_codes
from tinysd_batch.quantize.calibration.layerwise import CalibratedLayer
from tinysd_batch.quantize.calibration.trajectories import Trajectories
from tinysd_batch.quantize.recipe import Recipe
from tinysd_batch.quantize.solve.coordinate_descent import AffineGrid
from tinysd_batch.quantize.sources.checkpoint_source import SourceComponent, StatusCallback

WARMUP_STEPS = 20
LOG_INTERVAL_STEPS = 25
AFFINE_LR = 1e-3  # of scales and offsets, relative to their scale
OTHER_LR = 5e-4  # of biases and norms
ADAM_BETAS = (0.9, 0.99)


@dataclass(frozen=True, slots=True)
class DistilledUNet:
    """What distillation changed."""

    layers: dict[str, CalibratedLayer]
    norms: dict[str, Tensor]  # all other one-dimensional tensors, float16
    error_before: float  # weighted mean squared error of the predicted noise on the tuning prompts
    error_after: float


@dataclass(frozen=True, slots=True)
class DistillationExamples:
    """Inputs of N UNet calls, and the float model's predictions for them."""

    latents: Tensor  # [N, 4, h, w]
    times: Tensor  # [N]
    context: Tensor  # [N, T, D]
    noise: Tensor  # [N, 4, h, w]
    loss_weights: Tensor  # [N]

    @classmethod
    def from_trajectories(cls, trajectories: Trajectories, prompts: Tensor, sigmas: Tensor) -> "DistillationExamples":
        """Take all UNet calls of these prompts, with and without the prompt.

        `sigmas` [1000] are the noise levels of all timesteps.
        """
        calls, count = len(trajectories.times), len(prompts)
        times = trajectories.times.repeat_interleave(count)
        latents = trajectories.latents[:, prompts].flatten(0, 1)
        contexts = [
            tensor[prompts].repeat(calls, 1, 1) for tensor in (trajectories.context, trajectories.context_without)
        ]
        noises = [tensor[:, prompts].flatten(0, 1) for tensor in (trajectories.noise, trajectories.noise_without)]
        weights = compute_timestep_weights(sigmas)[times.long()]
        return cls(
            latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat(contexts), torch.cat(noises), weights.repeat(2)
        )

    def select(self, chosen: Tensor) -> "DistillationExamples":
        """Return the examples at these indexes."""
        return DistillationExamples(*(getattr(self, name)[chosen] for name in DistillationExamples.__slots__))

    def to(self, device: torch.device) -> "DistillationExamples":
        return DistillationExamples(*(getattr(self, name).to(device) for name in DistillationExamples.__slots__))


def compute_timestep_weights(sigmas: Tensor) -> Tensor:
    """Return the weight of an error at each of the 1000 timesteps, with mean 1.

    Errors weigh more where noise is strong, because all later steps inherit them. This is a compromise between equal
    weights and weights by the step's length in sigma, under which the last steps would hardly be trained.
    """
    weights = 1 + sigmas
    return weights / weights.mean()


class StudentUNet:
    """The calibrated UNet, with gradients for everything but the codes and the float tensors of two or more dimensions.

    Scales and offsets are trained as differences from their initial values, in units of the group's scale.
    """

    def __init__(self, component: SourceComponent, layers: Mapping[str, CalibratedLayer], device: torch.device) -> None:
        self.unet = UNet2DConditionModel.from_config(dict(component.config)).to(device).eval()
        self.unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on the CPU
        self.shapes = {name: component.tensors[f"{name}.weight"].shape for name in layers}
        self.calibrated_layers = layers
        self.codes: dict[str, Tensor] = {}
        self.initial_affine: dict[str, tuple[Tensor, Tensor]] = {}
        self.affine_deltas: dict[str, tuple[Tensor, Tensor]] = {}
        self.frozen_tensors: dict[str, Tensor] = {}
        self.trained_tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            scale, offset = (tensor.float().to(device) for tensor in get_scales_and_offsets(layer.weight))
            self.codes[name] = unpack_codes(layer.weight.qweight, layer.weight.bits).to(device)
            self.initial_affine[name] = scale, offset
            deltas = torch.zeros_like(scale), torch.zeros_like(offset)
            self.affine_deltas[name] = deltas[0].requires_grad_(), deltas[1].requires_grad_()
        biases = {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
        for name, tensor in component.tensors.items():
            if name.removesuffix(".weight") in layers:
                continue
            value = biases.get(name, tensor).half().float().to(device)
            if value.dim() == 1:
                self.trained_tensors[name] = value.requires_grad_()
            else:
                self.frozen_tensors[name] = value

    def current_affine(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the current scales and offsets [O, G] of a layer."""
        (scale, offset), (scale_delta, offset_delta) = self.initial_affine[name], self.affine_deltas[name]
        unit = scale.abs().clamp(min=1e-6)
        return scale + unit * scale_delta, offset + unit * offset_delta

    def dequantize_layer(self, name: str) -> Tensor:
        """Return the current weight [O, K] of a layer."""
        scale, offset = self.current_affine(name)
        codes = self.codes[name].view(*scale.shape, -1)
        return (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1)

    def predict(self, examples: DistillationExamples) -> Tensor:
        """Predict the noise [N, 4, h, w] in the examples' latents."""
        weights = {f"{name}.weight": from_matrix(self.dequantize_layer(name), self.shapes[name]) for name in self.codes}
        parameters = {**self.frozen_tensors, **self.trained_tensors, **weights}
        inputs = (examples.latents, examples.times, examples.context)
        predicted: Tensor = functional_call(self.unet, parameters, inputs).sample
        return predicted

    def weighted_error(self, examples: DistillationExamples) -> Tensor:
        """Return the weighted mean squared error against the float model's predictions."""
        squared_error = (self.predict(examples) - examples.noise).square().mean(dim=(1, 2, 3))
        return (squared_error * examples.loss_weights).mean()

    def parameter_groups(self) -> list[dict[str, object]]:
        """Return the optimizer's parameter groups; `base` is a group's highest learning rate."""
        deltas = [delta for pair in self.affine_deltas.values() for delta in pair]
        return [
            {"params": deltas, "base": AFFINE_LR},
            {"params": list(self.trained_tensors.values()), "base": OTHER_LR},
        ]

    @torch.no_grad()
    def round_and_export(self) -> tuple[dict[str, CalibratedLayer], dict[str, Tensor]]:
        """Round everything to what files can store, and return the layers and the norms.

        The student itself computes with the rounded values from then on.
        """
        norms = {name: value.half() for name, value in self.trained_tensors.items()}
        for name, value in self.trained_tensors.items():
            value.copy_(norms[name].float())
        layers = {}
        for name, layer in self.calibrated_layers.items():
            scale, offset = self.current_affine(name)
            grid = AffineGrid.from_affine(scale, offset)
            scale, offset = grid.snap_values(scale), grid.snap_values(offset, 2)
            self.initial_affine[name] = scale, offset
            for delta in self.affine_deltas[name]:
                delta.zero_()
            weight = grid.pack(self.codes[name], scale, offset, layer.weight.bits).to("cpu")
            bias = norms.pop(f"{name}.bias", None)
            layers[name] = CalibratedLayer(weight, None if bias is None else bias.cpu(), layer.sqnr_db)
        return layers, {name: value.cpu() for name, value in norms.items()}


def distill_unet(
    component: SourceComponent,
    layers: Mapping[str, CalibratedLayer],
    training: DistillationExamples,
    tuning: DistillationExamples,
    recipe: Recipe,
    device: torch.device,
    on_status: StatusCallback,
) -> DistilledUNet | None:
    """Distill a calibrated UNet.

    Args:
        component: The float UNet.
        layers: Its calibrated layers.
        training: Examples to train on.
        tuning: Other examples, on which the error is measured before and after.
        recipe: Steps, batch size and seed.
        device: Where to compute.
        on_status: Called with one line of text from time to time.

    Returns:
        What changed; None if the error on the tuning examples did not decrease.
    """
    student = StudentUNet(component, layers, device)
    error_before = measure_weighted_error(student, tuning, recipe.batch, device)
    optimizer = torch.optim.Adam(student.parameter_groups(), lr=0.0, betas=ADAM_BETAS)
    for step, batch in enumerate(iter_training_batches(training, recipe, device)):
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.tune_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * (warmup * cosine)
        loss = student.weighted_error(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % LOG_INTERVAL_STEPS == 0:
            on_status(f"distilling, step {step + 1:,} of {recipe.tune_steps:,}: error {loss.item():.5f}")
    distilled_layers, norms = student.round_and_export()
    error_after = measure_weighted_error(student, tuning, recipe.batch, device)
    on_status(f"error on the tuning prompts: {error_before:.5f} before distillation, {error_after:.5f} after")
    return DistilledUNet(distilled_layers, norms, error_before, error_after) if error_after < error_before else None


def iter_training_batches(
    examples: DistillationExamples, recipe: Recipe, device: torch.device
) -> Iterator[DistillationExamples]:
    """Yield a random batch on `device` for each step of the recipe."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(recipe.tune_steps):
        chosen = torch.randint(len(examples.times), (recipe.batch,), generator=generator)
        yield examples.select(chosen).to(device)


@torch.no_grad()
def measure_weighted_error(
    student: StudentUNet, examples: DistillationExamples, batch_size: int, device: torch.device
) -> float:
    """Return the student's error over all examples."""
    batches = torch.split(torch.arange(len(examples.times)), batch_size)
    errors = [student.weighted_error(examples.select(batch).to(device)) * len(batch) for batch in batches]
    return float(torch.stack(errors).sum() / len(examples.times))
