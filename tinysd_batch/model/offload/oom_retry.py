"""Repeat work that ran out of memory within the budget."""

import logging
from collections.abc import Callable
from typing import TypeVar

from tinysd_batch.errors import is_out_of_memory
from tinysd_batch.model.offload.planner import Planner

T = TypeVar("T")

logger = logging.getLogger(__name__)


def retry_if_out_of_memory(planner: Planner, run: Callable[[], T]) -> T:
    """Run it, and repeat it with a larger fragmentation reserve if memory runs out within the budget.

    The fragmentation of torch's allocator and the workspaces of libraries cannot be computed in advance.
    """
    while True:
        try:
            return run()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not planner.increase_fragmentation_share():
                raise
            logger.info("out of memory within the budget; planning with a larger fragmentation reserve: %s", error)
