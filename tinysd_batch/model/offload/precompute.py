"""What depends only on the timestep or only on the prompt: computed once, on the host, and never on the card.

Of a UNet those are the time embedding with each resnet's projection of it, and keys and values of cross-attention:
47 M of SD v1's 860 M weights. In the places of their layers stand `Known` ones, which hand out what was computed.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tinysd_batch.model.offload.components import Component
from tinysd_batch.model.packed.dequantize import SCRATCH
from tinysd_batch.model.packed.layers import PackedLayer

HOST = torch.device("cpu")


class PrecomputedOutput(nn.Module):
    """In place of a layer: what that would say. Its input names rows of it; None stands for all."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.value: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        assert self.value is not None, "nothing was computed for this layer"
        return self.value if rows.is_floating_point() else self.value[rows.flatten()]


@dataclass(frozen=True, slots=True)
class CrossAttentionKV:
    """Keys and values of every cross-attention for a batch's prompts."""

    rows: Tensor  # [R], of each row of the batch: which of the prompts is its own
    values: list[Tensor]  # of each layer [U, T, C], for U different prompts, on the device

    @property
    def prompts(self) -> int:
        """How many different ones."""
        return len(self.values[0]) if self.values else 0


class PrecomputedLayers:
    """Takes the layers out of a UNet, and works them on the host in float32, each prompt by itself."""

    def __init__(self, unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> None:
        """Raises ModelError as `Component` does."""
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        unet.time_embedding = None
        self.resnets = [one for one in unet.modules() if isinstance(one, ResnetBlock2D)]
        self.activations = [resnet.nonlinearity for resnet in self.resnets]
        for resnet in self.resnets:
            if isinstance(resnet.nonlinearity, nn.SiLU):  # in place, now that the embedding no longer passes it
                resnet.nonlinearity = nn.SiLU(inplace=True)
        paths = {module: path for path, module in unet.named_modules()}
        taken = {"time_embedding": self.time_embedding}

        def take(owner: nn.Module, name: str) -> tuple[nn.Module, PrecomputedOutput]:
            layer = taken[f"{paths[owner]}.{name}"] = getattr(owner, name)
            known = PrecomputedOutput(getattr(layer, "out_features"))  # noqa: B009 - linear layers, packed or not
            setattr(owner, name, known)
            return layer, known

        crosses = [one.attn2 for one in unet.modules() if isinstance(one, BasicTransformerBlock)]
        self.time_layers = [take(resnet, "time_emb_proj") for resnet in self.resnets]
        self.context_layers = [take(cross, name) for cross in crosses for name in ("to_k", "to_v")]
        self.fragment = Component("projections", taken, tensors, torch.float32)
        self.times: dict[float, list[Tensor]] = {}  # timestep -> of each resnet [1, C], float32
        self.at_hand: Tensor | None = None  # what the resnets have of it, [1, all C], on the device
        self.prompts: dict[bytes, list[Tensor]] = {}  # prompt -> of each layer [T, C], float32

    def prepare_timesteps(self, times: Sequence[float]) -> None:
        """Learn these timesteps and forget others. All anew, so that no number depends on what was drawn before."""
        different = tuple(dict.fromkeys(times))
        if different == tuple(self.times):
            return
        with self.at_work():
            embedding = self.time_embedding(self.time_proj(torch.tensor(different)))
            layers = [
                torch.as_tensor(layer(activate(embedding))).unsqueeze(1).unbind()
                for activate, (layer, _) in zip(self.activations, self.time_layers, strict=True)
            ]
        self.times = {time: [layer[number] for layer in layers] for number, time in enumerate(different)}

    def set_timestep(self, time: float, device: torch.device, dtype: torch.dtype) -> None:
        """Have every resnet use this timestep."""
        if time not in self.times:
            self.prepare_timesteps([time])
        together = torch.cat(self.times[time], dim=1)  # one copy to the device, not one for each resnet
        if self.at_hand is None or (self.at_hand.dtype, self.at_hand.device.type) != (dtype, device.type):
            with torch.inference_mode(False):  # else nobody outside the inference mode could write to it later
                self.at_hand = torch.empty(together.shape, dtype=dtype, device=device)
            views = torch.split(self.at_hand, [value.shape[1] for value in self.times[time]], dim=1)
            for (_, known), view in zip(self.time_layers, views, strict=True):
                known.value = view
        self.at_hand.copy_(together)  # always there: graphs read it there

    def compute_context_kv(self, context: Tensor, device: torch.device, dtype: torch.dtype) -> CrossAttentionKV:
        """What cross-attention makes of prompts [R, T, D]; those of the call before are remembered."""
        context = context.to(HOST, torch.float32)
        names = [row.numpy().tobytes() for row in context]
        different = dict(zip(names, context, strict=True))
        missing = {name: row for name, row in different.items() if name not in self.prompts}
        self.prompts = {name: self.prompts[name] for name in different if name in self.prompts}
        if missing:
            with self.at_work():
                made = [each_alone(layer, list(missing.values())) for layer, _ in self.context_layers]
            self.prompts |= dict(zip(missing, map(list, zip(*made, strict=True)), strict=True))
        places = {name: number for number, name in enumerate(different)}
        layers = zip(*(self.prompts[name] for name in different), strict=True)
        values = [torch.stack(layer).to(device, dtype) for layer in layers]
        return CrossAttentionKV(torch.tensor([places[name] for name in names], device=device), values)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self.fragment.onload(HOST)
        try:
            yield
        finally:
            self.fragment.offload()
            SCRATCH.release(HOST)

    def use_context_kv(self, attended: CrossAttentionKV) -> None:
        """Have every cross-attention use these."""
        for (_, known), value in zip(self.context_layers, attended.values, strict=True):
            known.value = value

    def use_meta_tensors(self, prompts: int, tokens: int, dtype: torch.dtype) -> None:
        """Shapes without numbers, for a walk on the meta device."""
        self.at_hand = None
        for _, known in self.time_layers:
            known.value = torch.empty(1, known.features, dtype=dtype, device="meta")
        for _, known in self.context_layers:
            known.value = torch.empty(prompts, tokens, known.features, dtype=dtype, device="meta")

    def forget(self, *, all_of_it: bool = False) -> None:
        """Let go of what is on the device, or of what is remembered on the host, too."""
        if all_of_it:
            self.times, self.prompts = {}, {}
        self.at_hand = None
        for _, known in [*self.time_layers, *self.context_layers]:
            known.value = None


def each_alone(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a layer makes of each input; its weights are unpacked once."""
    if not isinstance(layer, PackedLayer):
        return [layer(one) for one in inputs]
    layer.keeps_dequantized = True
    try:
        return [layer(one) for one in inputs]
    finally:
        layer.forget()
