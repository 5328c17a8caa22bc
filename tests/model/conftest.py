"""A card to work on: pretended always, a real one with `pytest -m gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from tests.card.card import Card
from tests.card.driver import COMPILER
from tests.card.idle import IdleCard
from tests.card.pretend import pretended
from tests.card.streams import Race

AnyCard = TypeVar("AnyCard", bound=Card)


@pytest.fixture
def pretended_card() -> Iterator[Card]:
    """A card of 4 GiB; all work on it was in good order."""
    with in_good_order(Card()) as card:
        yield card


@pytest.fixture
def idle_card() -> Iterator[IdleCard]:
    """The same, which computes nothing."""
    with in_good_order(IdleCard()) as card:
        yield card


@contextmanager
def in_good_order(card: AnyCard) -> Iterator[AnyCard]:
    if COMPILER is None:
        pytest.skip("no g++ here to compile the kernels with")
    if torch.cuda.is_available():
        pytest.skip("there is a real card")
    with pretended(card):
        yield card
    assert not Race.met
    assert not card.allocator.underway, "a capture that was begun and not ended"


@pytest.fixture
def real_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["pretended_card", pytest.param("real_card", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest) -> Card | None:
    """The pretended card, or None for a real one: what can be told of both is tested on both."""
    found: Card | None = request.getfixturevalue(request.param)
    return found
