"""Compute on the host, once, what depends only on the timestep or only on the prompt; its weights never go to the GPU.

In a UNet these are the time embedding with each resnet's projection of it, and the keys and values of cross-attention:
47 M of SD v1's 860 M weights. Their layers are replaced by `PrecomputedOutput` modules, which return what was computed.
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
    """Stand in for a layer and return its precomputed output.

    The input selects rows of the output by index; a floating-point input selects all rows.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.value: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        assert self.value is not None, "nothing was computed for this layer"
        return self.value if rows.is_floating_point() else self.value[rows.flatten()]


@dataclass(frozen=True, slots=True)
class CrossAttentionKV:
    """Keys and values of all cross-attention layers for the prompts of a micro-batch."""

    rows: Tensor  # [R]: for each row of the micro-batch, the index of its prompt
    values: list[Tensor]  # per layer [U, T, C], for U distinct prompts, on the device

    @property
    def prompts(self) -> int:
        """Number of distinct prompts."""
        return len(self.values[0]) if self.values else 0


class PrecomputedLayers:
    """Take layers out of a UNet and run them on the host in float32, each prompt by itself."""

    def __init__(self, unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> None:
        """Replace the layers of `unet`, which is changed in place. Raises ModelError as `Component` does."""
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        unet.time_embedding = None
        self.resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
        self.activations = [resnet.nonlinearity for resnet in self.resnets]
        for resnet in self.resnets:
            if isinstance(resnet.nonlinearity, nn.SiLU):  # may be in-place, since it no longer gets the embedding
                resnet.nonlinearity = nn.SiLU(inplace=True)
        paths = {module: path for path, module in unet.named_modules()}
        replaced = {"time_embedding": self.time_embedding}

        def replace_layer(owner: nn.Module, name: str) -> tuple[nn.Module, PrecomputedOutput]:
            layer = replaced[f"{paths[owner]}.{name}"] = getattr(owner, name)
            output = PrecomputedOutput(getattr(layer, "out_features"))  # noqa: B009 - linear layers, packed or not
            setattr(owner, name, output)
            return layer, output

        cross_attentions = [block.attn2 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
        self.time_layers = [replace_layer(resnet, "time_emb_proj") for resnet in self.resnets]
        self.context_layers = [replace_layer(module, name) for module in cross_attentions for name in ("to_k", "to_v")]
        self.fragment = Component("projections", replaced, tensors, torch.float32)
        self.timestep_features: dict[float, list[Tensor]] = {}  # by timestep: for each resnet [1, C], float32
        self.device_features: Tensor | None = None  # the current timestep's, [1, all C], on the device
        self.prompt_features: dict[bytes, list[Tensor]] = {}  # by prompt: for each layer [T, C], float32

    def prepare_timesteps(self, times: Sequence[float]) -> None:
        """Compute the features of these timesteps and drop all others.

        All are computed together, so that results do not depend on what was generated before.
        """
        distinct = tuple(dict.fromkeys(times))
        if distinct == tuple(self.timestep_features):
            return
        with self.weights_loaded():
            embedding = self.time_embedding(self.time_proj(torch.tensor(distinct)))
            layers = [
                torch.as_tensor(layer(activate(embedding))).unsqueeze(1).unbind()
                for activate, (layer, _) in zip(self.activations, self.time_layers, strict=True)
            ]
        self.timestep_features = {time: [layer[index] for layer in layers] for index, time in enumerate(distinct)}

    def set_timestep(self, time: float, device: torch.device, dtype: torch.dtype) -> None:
        """Let all resnets use this timestep."""
        if time not in self.timestep_features:
            self.prepare_timesteps([time])
        features = self.timestep_features[time]
        joined = torch.cat(features, dim=1)  # one copy to the device instead of one per resnet
        current = self.device_features
        if current is None or (current.dtype, current.device.type) != (dtype, device.type):
            with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
                current = self.device_features = torch.empty(joined.shape, dtype=dtype, device=device)
            views = torch.split(current, [value.shape[1] for value in features], dim=1)
            for (_, output), view in zip(self.time_layers, views, strict=True):
                output.value = view
        current.copy_(joined)  # always at the same address, where captured graphs read it

    def compute_context_kv(self, context: Tensor, device: torch.device, dtype: torch.dtype) -> CrossAttentionKV:
        """Compute the keys and values of prompts [R, T, D]. Those of the previous call are kept."""
        context = context.to(HOST, torch.float32)
        keys = [row.numpy().tobytes() for row in context]
        distinct = dict(zip(keys, context, strict=True))
        missing = {key: row for key, row in distinct.items() if key not in self.prompt_features}
        self.prompt_features = {key: self.prompt_features[key] for key in distinct if key in self.prompt_features}
        if missing:
            with self.weights_loaded():
                outputs = [run_separately(layer, list(missing.values())) for layer, _ in self.context_layers]
            self.prompt_features |= dict(zip(missing, map(list, zip(*outputs, strict=True)), strict=True))
        index_of = {key: index for index, key in enumerate(distinct)}
        layers = zip(*(self.prompt_features[key] for key in distinct), strict=True)
        values = [torch.stack(layer).to(device, dtype) for layer in layers]
        return CrossAttentionKV(torch.tensor([index_of[key] for key in keys], device=device), values)

    @contextlib.contextmanager
    def weights_loaded(self) -> Iterator[None]:
        self.fragment.onload(HOST)
        try:
            yield
        finally:
            self.fragment.offload()
            SCRATCH.release(HOST)

    def use_context_kv(self, context_kv: CrossAttentionKV) -> None:
        """Let all cross-attention layers use these keys and values."""
        for (_, output), value in zip(self.context_layers, context_kv.values, strict=True):
            output.value = value

    def use_meta_tensors(self, prompts: int, tokens: int, dtype: torch.dtype) -> None:
        """Use tensors of the right shapes, without data, for a run on the meta device."""
        self.device_features = None
        for _, output in self.time_layers:
            output.value = torch.empty(1, output.features, dtype=dtype, device="meta")
        for _, output in self.context_layers:
            output.value = torch.empty(prompts, tokens, output.features, dtype=dtype, device="meta")

    def forget(self, *, all_of_it: bool = False) -> None:
        """Drop what is on the device; with `all_of_it`, also what is kept on the host."""
        if all_of_it:
            self.timestep_features, self.prompt_features = {}, {}
        self.device_features = None
        for _, output in [*self.time_layers, *self.context_layers]:
            output.value = None


def run_separately(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a layer on each input by itself; packed weights are dequantized once."""
    if not isinstance(layer, PackedLayer):
        return [layer(x) for x in inputs]
    layer.keeps_dequantized = True
    try:
        return [layer(x) for x in inputs]
    finally:
        layer.clear_cache()
