"""Load packed model folders with the diffusers library: importing this module registers the format.

    import tinysd_batch.diffusers
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained("packed-folder")("red apple").images[0].save("apple.png")

Models load like any other diffusers model, and `save_pretrained` writes the packed tensors unchanged.
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

# diffusers looks in this module for the base class of `AutoencoderKLDecoder` to find out how to load it.
__all__ = ["AutoencoderKLDecoder", "ModelMixin", "TinySDConfig", "TinySDQuantizer"]


class QuantizationMethod(StrEnum):
    """Our quantization method. An enum, since diffusers reads the `value` of the method's name."""

    TINYSD = QUANT_METHOD


class TinySDConfig(QuantizationConfigMixin):  # type: ignore[misc] # diffusers is not typed
    """The `quantization_config` of a packed UNet. Keeps every entry, so that it is saved as it was read."""

    def __init__(self, **entries: Any) -> None:
        self.__dict__.update(entries, quant_method=QuantizationMethod.TINYSD)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the entries that diffusers prints."""
        return dict(self.to_dict())


class TinySDQuantizer(DiffusersQuantizer):  # type: ignore[misc] # diffusers is not typed
    """Inserts packed layers into a model that diffusers loads, and checks the file's tensors against them.

    Raises:
        ModelError: the file has another format version, or a tensor is missing, unexpected or of the wrong type or
            shape.
        UsageError: the device does not exist, or the options are not supported.
    """

    is_serializable = True
    is_trainable = False
    path: Path  # the weights file, or its folder if there are several
    loaded_keys: list[str]  # names of the file's tensors
    expected: dict[str, Tensor]  # the model's tensors, without data

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        if not self.pre_quantized:
            raise UsageError(
                "diffusers cannot quantize a float model while it loads it; "
                "tinysd_batch.quantize.data_free.quantize_folder writes a packed folder"
            )
        for device in set(device_map.values()) if isinstance(device_map, Mapping) else ():
            if device == "disk":
                raise UsageError("device_map: packed layers cannot be offloaded to disk; offload them to the CPU")
            choose_device(device)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Check the format; here diffusers passes the paths of the weights files for the first time."""
        first_file = Path(checkpoint_files[0])
        self.path = first_file if len(checkpoint_files) == 1 else first_file.parent
        self.loaded_keys = loaded_keys
        check_quantization_format(self.quantization_config.to_dict(), self.path)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        swap_packed_layers(model, parse_layouts(self.quantization_config.to_dict(), self.path))
        check_tensor_names(model, self.loaded_keys, self.path)
        self.expected = model.state_dict()
        model.config.quantization_config = self.quantization_config  # diffusers saves this attribute

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check the tensors of a file; after this, diffusers would silently cast integers of a wrong type."""
        for name, tensor in state_dict.items():
            expected = self.expected[name]
            # Floats may have any dtype: diffusers casts them to the requested one.
            is_float = tensor.is_floating_point() and expected.is_floating_point()
            check_tensor(name, tensor, tensor.dtype if is_float else expected.dtype, expected.shape, self.path)
        return state_dict

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del self.expected, self.loaded_keys
        folder = self.path if self.path.is_dir() else self.path.parent
        quantization = self.quantization_config.to_dict()
        correction = parse_correction(quantization, model.config.out_channels, folder / "config.json")
        if correction is not None:
            model.register_forward_hook(functools.partial(correct_output, correction), with_kwargs=True)
        return model


def correct_output(
    correction: NoiseCorrection, _: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Any:
    """Forward hook of a UNet: return its output, a tuple or an object, with each row's noise corrected."""
    timesteps = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten().tolist()
    noise = output[0]
    row_timesteps = timesteps if len(timesteps) == len(noise) else timesteps * len(noise)
    corrected = torch.stack(
        [correction.apply(row, timestep) for row, timestep in zip(noise, row_timesteps, strict=True)]
    )
    return (corrected, *output[1:]) if isinstance(output, tuple) else type(output)(sample=corrected)


class AutoencoderKLDecoder(AutoencoderKL):  # type: ignore[misc] # diffusers is not typed
    """`AutoencoderKL` without its encoder, for models that have none: they generate from text only."""

    @functools.wraps(AutoencoderKL.__init__)  # type: ignore[misc] # diffusers reads the options from the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder: nn.Module | None = None
        self.quant_conv: nn.Module | None = None

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        """Always raise UsageError."""
        raise UsageError("this model's VAE has no encoder: it generates from text, not from images")


AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TinySDQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TinySDConfig
