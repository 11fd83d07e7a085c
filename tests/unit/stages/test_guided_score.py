"""What the teacher alone is told is in its question and in its distributions, and in nothing that the student reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgedistill.asked import asked, conversation
from edgedistill.data.prompts import guided, parse_row
from edgedistill.fingerprint import Key
from edgedistill.stages.score import Score
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.data import encode_example
from edgedistill.training.recipe import load_kept
from edgedistill.training.targets import read_targets
from tests.unit.formats.gguf.conftest import make_model

ROW = {"id": "a", "prompt": "turn down the volume", "guidance": "thirty percent"}


def test_guidance_is_a_system_message_of_the_question() -> None:
    row = parse_row(ROW, "x:1")
    messages, _ = conversation(asked(row))
    assert messages == [
        {"role": "system", "content": "thirty percent"},
        {"role": "user", "content": "turn down the volume"},
    ]
    assert row.messages == ({"role": "user", "content": "turn down the volume"},)
    own = [{"role": "system", "content": "You act."}, *row.messages]
    assert guided(own, "Be brief.")[0] == {"role": "system", "content": "You act.\n\nBe brief."}
    assert guided(own, None) == own and row.to_json()["guidance"] == "thirty percent"


def test_distributions_are_taken_with_guidance_and_found_without(tmp_path: Path) -> None:
    make_model(tmp_path / "model", max_position_embeddings=1024)
    line = {"messages": [{"role": "user", "content": ROW["prompt"]}], "text": "alarm", "source": "teacher"}
    kept = [{**line, "id": "plain"}, {**line, "id": "told", "text": "call", "guidance": ROW["guidance"]}]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    folders = {name: tmp_path / name for name in ("out", "work")}
    for path in folders.values():
        path.mkdir()
    ctx: Any = SimpleNamespace(
        **folders,
        path=lambda key, name="": tmp_path / name,
        entries={Key("t"): SimpleNamespace(digest="d")},
        progress=lambda *_: None,
    )
    score = Score(teacher=Key("t"), kept=Key("k"), kind="top-k", n=5, temperature=1.0, seed=0, guided=True)
    score.run(ctx)
    examples, tokenizer = load_kept(tmp_path / "kept.jsonl", tmp_path / "model")
    found = read_targets(sorted((tmp_path / "out" / "targets").glob("*.parquet")), examples)
    teacher = TransformersTeacher(tmp_path / "model")
    system = {"role": "system", "content": ROW["guidance"]}
    read = [
        encode_example(
            tokenizer, [*([system] if one["id"] == "told" else []), *one["messages"]], one["text"], id=one["id"]
        )
        for one in kept
    ]
    for at, targets in teacher.score(read, kind="top-k", n=5):
        assert np.array_equal(found[at].ids, targets.ids)
        assert np.allclose(found[at].logp, targets.logp, atol=2e-3)
    without = dict(teacher.score(examples, kind="top-k", n=5))
    assert not np.allclose(found[1].logp, without[1].logp, atol=2e-3)
