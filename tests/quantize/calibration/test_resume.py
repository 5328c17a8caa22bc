"""The work folder of a calibration."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tinysd_batch.quantize.calibration.resume import WorkFolder
from tinysd_batch.quantize.calibration.trajectories import Trajectories


def test_trajectories_are_saved_whatever_their_memory_format(tmp_path: Path) -> None:
    maps = torch.randn(2, 3, 8, 8, 4).permute(0, 1, 4, 2, 3)  # channels-last, as convolutions of large maps return them
    context = torch.randn(3, 7, 5)
    generated = Trajectories(maps, torch.rand(2), maps * 2, maps * 3, maps[1], context, context + 1)
    WorkFolder(tmp_path).load_or_generate_trajectories("held_out", lambda: generated)
    loaded = WorkFolder(tmp_path).load_or_generate_trajectories("held_out", lambda: pytest.fail("generated again"))
    for field in fields(Trajectories):
        assert torch.equal(getattr(loaded, field.name), getattr(generated, field.name)), field.name
