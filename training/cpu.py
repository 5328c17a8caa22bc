"""What the processor at hand is good at."""

import torch


def mixed_precision() -> torch.autocast:
    """bf16 autocast where the processor has matrix tiles for it; emulated bf16 is twenty times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported())
