"""Precision of training on this CPU."""

import torch


def mixed_precision() -> torch.autocast:
    """Use bfloat16 autocast on CPUs with AMX tiles; emulated bfloat16 is twenty times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())
