"""Packed model folders in the diffusers library: importing this module teaches it the format.

    import tinysd_batch.diffusers
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained("packed-folder")("red apple").images[0].save("apple.png")

Models load in diffusers' own way, and `save_pretrained` writes the packed tensors back as they were.
"""

import functools
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from tinysd_batch.errors import UsageError
from tinysd_batch.model.checkpoint.folder import (
    QUANT_METHOD,
    check_quantization_format,
    check_tensor,
    check_tensor_names,
    parse_layouts,
)
from tinysd_batch.model.device.select import choose_device
from tinysd_batch.model.packed.layers import swap_packed_layers
from tinysd_batch.model.sampling.noise_correction import NoiseCorrection, parse_correction

# diffusers finds out how to load `AutoencoderKLDecoder` by the base classes that it sees in this module.
__all__ = ["AutoencoderKLDecoder", "ModelMixin", "TinySDConfig", "TinySDQuantizer"]


class QuantizationMethod(StrEnum):
    """diffusers asks the method's name for its `value`."""

    TINYSD = QUANT_METHOD


class TinySDConfig(QuantizationConfigMixin):  # type: ignore[misc] # diffusers is not typed
    """The `quantization_config` of a packed UNet; keeps every entry, so that it is saved as it was read."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries, quant_method=QuantizationMethod.TINYSD)

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers prints."""
        return dict(self.to_dict())


class TinySDQuantizer(DiffusersQuantizer):  # type: ignore[misc] # diffusers is not typed
    """Puts packed layers into a model that diffusers loads, and checks the file against them.

    Raises ModelError for another version's file, and for a tensor that is missing, unexpected or of the wrong type or
    shape; UsageError for a device that is not there.
    """

    is_serializable = True
    is_trainable = False
    where: Path  # the file, or the folder where it is in several parts
    loaded_keys: list[str]  # the file's tensors
    expected: dict[str, Tensor]  # the model's tensors, empty

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        if not self.pre_quantized:
            raise UsageError(
                "diffusers cannot pack a float model while it loads it; "
                "tinysd_batch.quantize.data_free.quantize_folder writes a packed folder"
            )
        for device in set(device_map.values()) if isinstance(device_map, Mapping) else ():
            if device == "disk":
                raise UsageError("device_map: packed layers cannot wait on disk; let them wait on the CPU")
            choose_device(device)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Where diffusers first says which file it reads."""
        first = Path(checkpoint_files[0])
        self.where = first if len(checkpoint_files) == 1 else first.parent
        self.loaded_keys = loaded_keys
        check_quantization_format(self.quantization_config.to_dict(), self.where)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        swap_packed_layers(model, parse_layouts(self.quantization_config.to_dict(), self.where))
        check_tensor_names(model, self.loaded_keys, self.where)
        self.expected = model.state_dict()
        model.config.quantization_config = self.quantization_config  # diffusers saves it from there

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where diffusers shows the tensors of a file; after this it would cast integers of a wrong type silently."""
        for name, tensor in state_dict.items():
            place = self.expected[name]
            # Floats may be of any type: diffusers casts them to the one asked for.
            is_float = tensor.is_floating_point() and place.is_floating_point()
            check_tensor(name, tensor, tensor.dtype if is_float else place.dtype, place.shape, self.where)
        return state_dict

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del self.expected, self.loaded_keys
        folder = self.where if self.where.is_dir() else self.where.parent
        quantization = self.quantization_config.to_dict()
        correction = parse_correction(quantization, model.config.out_channels, folder / "config.json")
        if correction is not None:
            model.register_forward_hook(functools.partial(correct_output, correction), with_kwargs=True)
        return model


def correct_output(
    correction: NoiseCorrection, _: nn.Module, given: Sequence[Any], named: Mapping[str, Any], output: Any
) -> Any:
    """A UNet's output, a tuple or an object as asked for, with the noise corrected for each row's time."""
    times = torch.as_tensor(named["timestep"] if "timestep" in named else given[1]).flatten().tolist()
    noise = output[0]
    rows = times if len(times) == len(noise) else times * len(noise)
    corrected = torch.stack([correction.apply(row, time) for row, time in zip(noise, rows, strict=True)])
    return (corrected, *output[1:]) if isinstance(output, tuple) else type(output)(sample=corrected)


class AutoencoderKLDecoder(AutoencoderKL):  # type: ignore[misc] # diffusers is not typed
    """`AutoencoderKL` without its encoder, for models that come without one: they draw from text only."""

    @functools.wraps(AutoencoderKL.__init__)  # type: ignore[misc] # diffusers reads the options off the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder: nn.Module | None = None
        self.quant_conv: nn.Module | None = None

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UsageError always."""
        raise UsageError("this model's autoencoder has no encoder: it draws from text, not from pictures")


AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TinySDQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TinySDConfig
