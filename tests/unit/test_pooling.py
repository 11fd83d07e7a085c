"""How a checkpoint says that it makes one vector of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import UsageError
from edgedistill.pooling import Pooling, pooling_of

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
CLS = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def write(folder: Path, architecture: str = "BertModel", modules: Any = None, pooling: Any = None, **more: Any) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **more}))
    for name, value in (("modules.json", modules), ("1_Pooling/config.json", pooling)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("files", "asked", "pooling"),
    [
        ({}, None, "mean"),
        ({"modules": MODULES, "pooling": CLS}, None, "cls"),
        ({"modules": MODULES, "pooling": CLS}, "mean", "mean"),
        ({"pooling": {"pooling_mode": "lasttoken"}}, None, "last"),
        ({"pooling": {"pooling_mode": "mean"}}, None, "mean"),
        ({"architecture": "LlamaForCausalLM", "pooling": {"pooling_mode_lasttoken": True}}, None, "last"),
        ({"architecture": "LlamaForCausalLM"}, "mean", "mean"),
    ],
)
def test_pooling(tmp_path: Path, files: dict[str, Any], asked: Pooling | None, pooling: str) -> None:
    assert pooling_of(write(tmp_path, **files), asked) == pooling


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"architecture": "LlamaForCausalLM"}, "a decoder, and nothing says"),
        ({"pooling": {**CLS, "pooling_mode_mean_tokens": True}}, "cls_token and mean_tokens"),
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "weightedmean_tokens, which is not known"),
        ({"modules": [*MODULES, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]}, "a layer 'Dense'"),
        ({"architecture": "T5EncoderModel", "is_encoder_decoder": True}, "an encoder with a decoder"),
    ],
)
def test_what_gives_no_vector_is_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pooling_of(write(tmp_path, **files))
