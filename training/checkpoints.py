"""Training state on disk, written atomically, so that a stop at any moment loses only minutes."""

from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """Load the saved state; None if nothing has been saved yet."""
    return torch.load(path, weights_only=True) if path.exists() else None
