"""The cost of images, by which workers get equal amounts of work."""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.planning import SETTINGS, make_row, plan_requests
from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.records import MicroBatch


def test_cost_counts_pixels_steps_guidance_and_second_unet_calls() -> None:
    (image,) = plan_requests([make_row(1, 7, 1, 1)])

    def cost(**settings: Any) -> float:
        request = replace(image, settings=replace(SETTINGS, **settings))
        return estimate_batch_cost(MicroBatch((request,), frozenset({1})))

    assert cost(width=1024) == 2 * cost()
    assert cost(steps=100) / cost() == pytest.approx(2, rel=0.05)
    assert cost(sampler="heun") / cost() == pytest.approx(2, rel=0.05)
    assert cost() / cost(scale=1.0) == pytest.approx(2, rel=0.05)
