"""A real model, small enough to load and draw in milliseconds: SD's classes with random weights, packed.

And a folder to work in, and a card to work on: one that is pretended always, a real one with `pytest -m gpu`.
"""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hypothesis
import pytest

from tests.tools import DEFAULT_EXAMPLES, made_once, write_json
from tinysd_batch.model.checkpoint.info import embedded_path

# Heavy libraries are imported in fixtures: the process that only hands out tests to its workers has no use for them.
if TYPE_CHECKING:
    from tests.card.card import Card
    from tests.card.idle import IdleCard

TEXT_WIDTH = 32
AnyCard = TypeVar("AnyCard", bound="Card")

# A busy machine is not the code's fault: no deadlines, and no complaint about slow generation of examples. Every run
# tries the same examples, ten times as many with HYPOTHESIS_PROFILE=thorough.
hypothesis.settings.register_profile(
    "patient", max_examples=DEFAULT_EXAMPLES, derandomize=True, deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("patient"), max_examples=10 * DEFAULT_EXAMPLES
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))


def pytest_collection_finish() -> None:
    """Keep what was imported out of each garbage collection, which takes half a second with it and is called a lot."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model folder: 16x16 pixels, four blocks a side named as SD v1's, random weights."""
    return made_once(tmp_path_factory, "models/float", write_float_model)


def write_float_model(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )
    vae = AutoencoderKL(
        latent_channels=4, sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    tokenizer = embedded_path() / "tokenizer"
    vocabulary = len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    for name, module in (("unet", unet), ("vae", vae)):
        module.save_pretrained(folder / name)
    (folder / "text_encoder").mkdir()
    write_json(folder / "text_encoder" / "config.json", text.config.to_dict())
    save_file({n: v.contiguous() for n, v in text.state_dict().items()}, folder / "text_encoder" / "model.safetensors")
    for part in ("tokenizer", "scheduler"):
        (folder / part).mkdir()
        for file in (embedded_path() / part).iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes())
    write_json(folder / "tinysd.json", {"name": "random 16", "steps": 2, "scale": 2.0})


@pytest.fixture(scope="session")
def tiny_model(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model packed to 2, 4 and 8 bits."""
    from tinysd_batch.quantize.data_free import quantize_folder

    return made_once(tmp_path_factory, "models/packed", lambda out: quantize_folder(float_model, out, "quality"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, besides a good manifest."""
    (tmp_path / "m.csv").write_text("prompt\ncat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pretended_card() -> "Iterator[Card]":
    """A card of 4 GiB; all work on it was in good order."""
    from tests.card.card import Card

    with in_good_order(Card()) as card:
        yield card


@pytest.fixture
def idle_card() -> "Iterator[IdleCard]":
    """The same, which computes nothing."""
    from tests.card.idle import IdleCard

    with in_good_order(IdleCard()) as card:
        yield card


@contextmanager
def in_good_order(card: AnyCard) -> Iterator[AnyCard]:
    import torch

    from tests.card.driver import COMPILER
    from tests.card.pretend import pretended
    from tests.card.streams import Race

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
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["pretended_card", pytest.param("real_card", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest) -> "Card | None":
    """The pretended card, or None for a real one: what can be told of both is tested on both."""
    found: Card | None = request.getfixturevalue(request.param)
    return found
