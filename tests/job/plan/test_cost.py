"""The cost of images, by which workers get equal amounts of work."""

from dataclasses import replace

import pytest

from tests.support.planning import PARAMS, make_row, plan_requests
from tinysd_batch.job.plan.cost import estimate_batch_cost
from tinysd_batch.records import MicroBatch


def test_cost_counts_pixels_steps_guidance_and_second_unet_calls() -> None:
    (image,) = plan_requests([make_row(1, 7, 1, 1)])

    def cost(**params: object) -> float:
        request = replace(image, params=replace(PARAMS, **params))  # type: ignore[arg-type]
        return estimate_batch_cost(MicroBatch((request,), frozenset({1})))

    assert cost(width=1024) == 2 * cost()
    assert cost(steps=100) / cost() == pytest.approx(2, rel=0.05)
    assert cost(sampler="heun") / cost() == pytest.approx(2, rel=0.05)
    unguided = estimate_batch_cost(MicroBatch((replace(image, scale=1.0),), frozenset({1})))
    assert cost() / unguided == pytest.approx(2, rel=0.05)
