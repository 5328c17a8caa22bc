"""Prompts encoded by a layer of the text encoder that is not the last one, as in the web UI and diffusers."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support.files import write_csv
from tests.support.jobs import draw, read_results
from tests.support.settings import make_image_settings, make_settings
from tinysd_batch.errors import UsageError
from tinysd_batch.images import read_metadata
from tinysd_batch.job.manifest.validate import RowDefaults, build_row
from tinysd_batch.model.checkpoint.info import embedded_model_path, read_model_info
from tinysd_batch.model.text.encoder import PromptEncoder
from tinysd_batch.model.text.tokenizer import read_tokenizer
from tinysd_batch.model.tiny_sd import TinySD
from tinysd_batch.records import ImageRequest, InvalidRow

LAYERS = 12  # as SD v1 has
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    """Return SD v1's text encoder in small, with random weights."""
    torch.manual_seed(0)
    tokenizer = read_tokenizer(embedded_model_path() / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    device = nullcontext(torch.device("cpu"))
    return PromptEncoder(tokenizer, CLIPTextModel(config).eval(), MAX_TOKENS, lambda: device)


@torch.no_grad()
@pytest.mark.parametrize("clip_skip", range(1, LAYERS + 1))
def test_the_embedding_is_the_normalized_output_of_that_layer(encoder: PromptEncoder, clip_skip: int) -> None:
    """As in diffusers' `encode_prompt`, which counts from 0."""
    prompts = ["a red apple", "a bee"]
    ids = encoder.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    hidden_states = encoder.encoder(ids, output_hidden_states=True).hidden_states
    assert len(hidden_states) == LAYERS + 1
    expected = encoder.encoder.final_layer_norm(hidden_states[-clip_skip])
    settings = make_image_settings(clip_skip=clip_skip, negative_prompt=prompts[1])
    (conditioning,) = encoder.encode([ImageRequest(prompts[0], 0, settings)])
    assert conditioning.negative_embedding is not None
    actual = torch.stack([conditioning.embedding, conditioning.negative_embedding])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_images_of_one_batch_may_differ_in_it(encoder: PromptEncoder) -> None:
    requests = [ImageRequest("a bee", 0, make_image_settings(clip_skip=clip_skip)) for clip_skip in (1, 2, 5, 2)]
    encoder.cache.clear()
    together = [conditioning.embedding for conditioning in encoder.encode(requests)]
    encoder.cache.clear()
    alone = [encoder.encode([request])[0].embedding for request in requests]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert torch.equal(together[1], together[3])
    assert len({embedding.numpy().tobytes() for embedding in together}) == 3
    assert len(encoder.encoder.encoder.layers) == LAYERS


def test_a_model_with_fewer_layers_refuses_it() -> None:
    info = read_model_info("embedded")
    model = TinySD.from_pretrained(device="cpu")
    with pytest.raises(UsageError, match=r"clip_skip = 3: must be between 1 and 2 with this model"):
        model.generate("a bee", 1, clip_skip=3)
    row = build_row(1, {"prompt": "a bee", "clip_skip": "3"}, RowDefaults(make_settings(), info))
    assert isinstance(row, InvalidRow)
    assert row.reason == "column clip_skip = '3': must be between 1 and 2 with this model"


def test_a_column_of_it_decides_metadata_and_results(tmp_path: Path) -> None:
    rows = [{"prompt": "a bee", "seed": 1, "Clip skip": clip_skip} for clip_skip in (1, 2, "")]
    job = tmp_path / "job"
    draw(write_csv(tmp_path / "m.csv", rows), job, embedded_model_path(), steps=1, max_batch=3)
    results = read_results(job)
    assert [row["clip_skip"] for row in results] == [1, 2, 1]
    first, second, third = (row["image_id"] for row in results)
    assert first == third != second
    data = [(job / row["file_name"]).read_bytes() for row in results]
    assert [read_metadata(each)[1]["clip_skip"] for each in data] == [1, 2, 1]
    assert ["Clip skip: 2" in read_metadata(each)[0] for each in data] == [False, True, False]
