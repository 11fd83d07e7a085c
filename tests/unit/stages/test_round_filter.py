"""What a round keeps of the answers to a prompt, what stands beside it, and which prompts are put at all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.stages.filter_rounds import RoundFilter, ThinkingRoundFilter
from edgedistill.stages.generate import GenerateFailed

ANSWERS, BEFORE = Key("a" * 64), Key("b" * 64)
RIGHT = ("yes", " yes", "yes ")  # three texts that are all right by the metric "exact"
IDS = ("r0", "r1", "r2", "r3")


def rows(*ids: str) -> tuple[Row, ...]:
    return tuple(Row(id=name, messages=({"role": "user", "content": f"say {name}"},), reference="yes") for name in ids)


def make(**fields: Any) -> RoundFilter:
    spec = {"kind": "reference", "metric": "exact", "otherwise": fields.pop("otherwise", "drop")}
    settings: dict[str, Any] = {"by": "student", "keep": 1, "before": None, "replay": 0.0, "rows": rows(*IDS), **fields}
    kind = ThinkingRoundFilter if "style" in fields else RoundFilter
    return kind(answers=ANSWERS, rows_digest="", filters=(spec,), **settings)


def run(
    stage: RoundFilter, answers: list[tuple[str, str, str]], before: list[dict[str, Any]] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the stage over (row id, text, finish); return its facts and what it kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("out", "answers", "before"):
            (folder / part).mkdir()
        lines = [
            {"id": row, "row": f"{row}-{at}", "sample": at, "text": text, "finish": finish, "logprob": -1.0}
            for at, (row, text, finish) in enumerate(answers)
        ]
        (folder / "answers" / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "before" / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before or []))
        places = {ANSWERS: "answers", BEFORE: "before"}
        ctx: Any = SimpleNamespace(
            progress=lambda *_: None, out=folder / "out", path=lambda key, file: folder / places[key] / file
        )
        facts = dict(stage.run(ctx))
        kept = (folder / "out" / "kept.jsonl").read_text().splitlines()
        return facts, [json.loads(line) for line in kept]


ANSWER = st.tuples(
    st.sampled_from(IDS), st.sampled_from((*RIGHT, "no", "yes and no")), st.sampled_from(("stop", "stop", "length"))
)


@given(
    answers=st.lists(ANSWER, max_size=24),
    keep=st.integers(1, 3),
    otherwise=st.sampled_from(("drop", "gold")),
    before=st.integers(0, 9),
    replay=st.floats(0, 1),
)
def test_what_a_round_keeps(
    answers: list[tuple[str, str, str]], keep: int, otherwise: str, before: int, replay: float
) -> None:
    taught = [
        {"id": f"r{at}", "messages": [], "text": f"old {at}", "reference": "x", "source": "teacher"}
        for at in range(before)
    ]
    stage = make(keep=keep, otherwise=otherwise, before=BEFORE, replay=replay, by="teacher")
    good = {
        row: list(dict.fromkeys(t for r, t, finish in answers if r == row and finish == "stop" and t in RIGHT))
        for row in IDS
    }
    asked = {row for row, _, _ in answers}
    carried = round(replay * before)
    if not carried and not any(good.values()) and not (otherwise == "gold" and asked):
        with pytest.raises(StepFailed, match="no answer of" if answers else "nothing to teach"):
            run(stage, answers, taught)
        return
    facts, kept = run(stage, answers, taught)
    old, new = [one for one in kept if one["text"].startswith("old")], kept[carried:]
    assert old == kept[:carried] and len({one["text"] for one in old}) == carried  # none of them twice
    assert len({one["id"] for one in kept}) == len(kept)
    for row in IDS:
        mine = [one for one in new if one["id"].partition("#")[0] == row]
        if good[row]:
            assert [one["text"] for one in mine] == good[row][:keep]  # the first, each text once
            assert {one["source"] for one in mine} == {"teacher"}
        elif row in asked and otherwise == "gold":
            assert [(one["text"], one["source"]) for one in mine] == [("yes", "gold")]
        else:
            assert mine == []
    assert (facts["asked"], facts["prompts"], facts["replayed"]) == (len(answers), len(asked), carried)
    assert facts["good"] == sum(map(bool, good.values())) and facts["kept"] == len(new)


def test_a_students_answers_are_named_as_such() -> None:
    facts, kept = run(make(), [("r0", "yes", "stop")])
    assert (facts["student"], facts["kept"], kept[0]["source"]) == (1, 1, "student")


def test_thinking_that_collapsed_in_the_students_own_answers_ends_the_round() -> None:
    text = join("think", "A thought of five words.", "yes")
    stage = make(style="think", keep=2)
    facts, kept = run(stage, [("r0", text, "stop"), ("r0", text, "stop"), ("r1", join("think", "", "yes"), "stop")])
    assert [one["text"] for one in kept] == [text, join("think", "", "yes")] and facts["thinking"]["n"] == 3
    with pytest.raises(StepFailed, match="of the student's 2 answers") as error:
        run(stage, [("r0", "yes", "stop"), ("r1", "yes", "stop")])
    assert "think_weight" in (error.value.hint or "")


def test_only_what_the_student_fails_is_asked(tmp_path: Path) -> None:
    stage = GenerateFailed(
        teacher=ANSWERS, rows_digest="", style="answer", samples=2, temperature=0.8, top_p=1.0, max_new_tokens=8, seed=1,
        rows=rows(*IDS), batch_size=4, student=BEFORE, suite="prompts", scores=None, min_score={},
    )  # fmt: skip
    (tmp_path / "answers").mkdir()
    found = {"r0": (1.0, "stop"), "r1": (0.0, "stop"), "r2": (1.0, "length"), "r3": (1.0, "stop")}
    (tmp_path / "answers" / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"id": name, "text": "t", "reference": "yes", "score": score, "valid": None, "tags": [], "tokens": 1,
                        "finish": finish, "details": {}}) + "\n"
            for name, (score, finish) in found.items()
        )
    )  # fmt: skip
    ctx: Any = SimpleNamespace(path=lambda _key, name: tmp_path / name)
    assert [row.id for row in stage.to_ask(ctx)] == ["r1", "r2"]
    assert {ANSWERS, BEFORE} == set(stage.inputs())
