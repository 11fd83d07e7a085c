"""The quickstart with a smaller hidden size, reduced in rows: up to the converted student, and nothing runs again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edgedistill.report import collect
from edgedistill.runner import Runner
from tests.e2e.conftest import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WIDTH = 512


def test_a_student_of_512_hidden_dimensions_converts_and_is_not_built_again(session_of: Callable[..., Any]) -> None:
    changes = {"student.hidden": WIDTH, "gates.min_speedup": None, "baselines": {}}
    session = session_of(targets=["phone-midrange"], **changes)
    plan = session.plan.only(session.plan.match("convert/student"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert {"shape", "heal", "distill/1", "merge", "convert/student"} <= set(outcome.ran)
    assert Runner(plan, session.store).build().ran == []
    entry = {name: session.store.load(plan.match(name)[0].key) for name in ("shape", "heal", "convert/student")}
    for name in ("shape", "heal"):
        config = json.loads((entry[name].path / "model" / "config.json").read_text())
        assert (config["hidden_size"], config["num_attention_heads"], config["head_dim"]) == (WIDTH, 9, 64)
        assert (config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]) == (30, 1024, 12800)
    log = read_jsonl(entry["heal"].path / "log" / "train.jsonl")
    assert log[0]["hidden"] < 0.3  # compared in its own basis, it starts near the teacher's states
    assert "512 of 576 hidden dimensions" in collect(session).student
