from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.data.thinking import join, split
from edgedistill.errors import StepFailed
from edgedistill.training import thinking
from edgedistill.training.recipe import load_kept

CALL = '{"name":"set_alarm"}'
TEXT = join("think", "They want to be woken, so this is an alarm.", CALL)


def kept(path: Path, *rows: dict[str, Any]) -> Path:
    messages = [{"role": "user", "content": "wake me"}]
    lines = [{"id": f"r{at}", "messages": messages, "reference": None, **row} for at, row in enumerate(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_weight_lies_on_the_block_and_nowhere_else(tmp_path: Path, smollm2: Path) -> None:
    file = kept(tmp_path / "kept.jsonl", {"text": TEXT}, {"text": CALL}, {"text": "Because.", "task": "rationale"})
    plain, tokenizer = load_kept(file, smollm2)
    assert all(not one.weights for one in plain)
    (block, bare, why), _ = load_kept(file, smollm2, think_weight=0.25)
    assert [one.completion_ids for one in (block, bare, why)] == [one.completion_ids for one in plain]
    cut = block.weights.index(1.0)
    assert set(block.weights[:cut]) == {0.25} and set(block.weights[cut:]) == {1.0}
    assert tokenizer.decode(block.completion_ids[cut:-1]) == split(TEXT).answer
    assert set(bare.weights) == {1.0}
    assert set(why.weights) == {0.25}


def test_the_weight_of_a_block_after_the_answer(tmp_path: Path, smollm2: Path) -> None:
    text = join("explanation", "They want to be woken, so this is an alarm.", CALL)
    (block,), tokenizer = load_kept(kept(tmp_path / "kept.jsonl", {"text": text}), smollm2, think_weight=0.25)
    cut = block.weights.index(0.25)
    assert tokenizer.decode(block.completion_ids[:cut]) == CALL
    assert set(block.weights[cut:-1]) == {0.25} and block.weights[-1] == 1.0  # the token that ends the turn


def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: list[str], begun: str) -> dict[str, Any]:
    """Watch a student whose every answer begins with ``begun``."""
    import edgedistill.teachers.transformers as teachers

    class Student:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def generate(self, prompts: list[Any], *, sampling: Any) -> list[Any]:
            return [SimpleNamespace(text=begun) for _ in prompts]

    monkeypatch.setattr(teachers, "TransformersTeacher", Student)
    monkeypatch.setattr(thinking, "_trained", lambda *_: None)
    file = kept(tmp_path / "kept.jsonl", *({"text": text} for text in taught))
    return thinking.watch_thinking(file, tmp_path, None, text="text", progress=lambda *_: None)


def test_a_student_that_stopped_thinking_fails_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = "<think>\nThey want to be woken, so th"
    assert watch(tmp_path, monkeypatch, [TEXT] * 40, begun) == {"thinking": {"n": 16, "empty": 0.0}}
    with pytest.raises(StepFailed, match="16 of 16 answers of the trained student begin without a thought") as error:
        watch(tmp_path, monkeypatch, [TEXT] * 40, "<think></think>")
    assert "distill.think_weight" in (error.value.hint or "")


def test_a_template_that_opens_the_block_in_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 style: the taught texts only close a block, and the first words of an answer do not even that."""
    taught = [TEXT.removeprefix("<think>")] * 8
    found = watch(tmp_path, monkeypatch, [CALL, *taught], "They want to be woken, so th")
    assert found == {"thinking": {"n": 9, "empty": 0.0}}
    with pytest.raises(StepFailed, match="without a thought"):
        watch(tmp_path, monkeypatch, taught, "</think>" + CALL)


def test_texts_that_do_not_think_are_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(tmp_path, monkeypatch, [CALL] * 3, "") == {}
    after = join("explanation", "They want to be woken, so this is an alarm.", CALL)
    assert watch(tmp_path, monkeypatch, [after] * 3, CALL) == {}  # its beginning is the answer
