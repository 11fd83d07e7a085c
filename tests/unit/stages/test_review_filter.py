"""What people said of answers, as a filter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.data.pairs import preference_pairs
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import join
from edgedistill.data.verdicts import Verdict, changes, shown_key
from edgedistill.fingerprint import Key
from edgedistill.stages.filter import Filter
from edgedistill.stages.filter_rounds import RoundFilter
from edgedistill.stages.filter_thinking import ThinkingFilter

GOLD = "gold"


def rows(*ids: str) -> tuple[Row, ...]:
    return tuple(
        Row(id=name, messages=({"role": "user", "content": f"say {name}"},), reference=GOLD, tags=(name[0],))
        for name in ids
    )


def verdicts(found: tuple[Row, ...], **said: tuple[str, str, str]) -> dict[str, Verdict]:
    """Make verdicts: row id -> (verdict, the text that was shown, the edited text or the reason)."""
    by_id, out = {row.id: row for row in found}, {}
    for name, (kind, text, more) in said.items():
        key = shown_key(name, by_id[name].messages, by_id[name].tools, text)
        extra = {"text": more} if kind == "edit" else {"reason": more}
        out[key] = Verdict(id=name, shown=key.split(" ")[-1], verdict=kind, **extra)
    return out


def run(tmp_path: Path, stage: Filter, answers: dict[str, list[str]]) -> tuple[dict[str, Any], Any, list[str]]:
    out = tmp_path / "out"
    out.mkdir()
    lines = [
        {"id": name, "row": f"{name}-{at}", "sample": at, "text": text, "finish": "stop", "logprob": -1.0 - at}
        for name, texts in answers.items()
        for at, text in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    notes: list[str] = []
    ctx: Any = SimpleNamespace(
        progress=lambda *_: None, out=out, path=lambda _key, name: tmp_path / name, note=notes.append
    )
    facts = dict(stage.run(ctx))
    return facts, lambda name: [json.loads(line) for line in (out / name).read_text().splitlines()], notes


def make(
    found: tuple[Row, ...],
    said: dict[str, Verdict],
    *after: dict[str, Any],
    otherwise: str = "drop",
    kind: Any = Filter,
) -> Any:
    spec = {"kind": "review", "file": changes(said), "metric": "json-exact", "otherwise": otherwise}
    more: dict[str, Any] = {"style": "think"} if kind is ThinkingFilter else {}
    if kind is RoundFilter:
        more = {"by": "student", "keep": 1, "before": None, "replay": 0.0}
    return kind(
        answers=Key("a" * 64),
        rows_digest="",
        filters=(spec, *after),
        rows=found,
        reviews={changes(said): said},
        **more,
    )


def test_rejected_goes_edited_is_taught_as_edited_and_the_rest_stays(tmp_path: Path) -> None:
    found = rows("a", "b", "c", "d")
    said = verdicts(
        found, a=("accept", "A", ""), b=("reject", "B", "rude"), c=("edit", "C", "see"), d=("reject", "not D", "")
    )
    facts, read, notes = run(tmp_path, make(found, said), {name: [name.upper()] for name in "abcd"})
    assert [(one["id"], one["text"], one["source"], one["row"]) for one in read("kept.jsonl")] == [
        ("a", "A", "teacher", "a-0"),
        ("c", "see", "review", ""),
        ("d", "D", "teacher", "d-0"),  # the verdict was on another text
    ]
    rejected = [(one["id"], one["text"], one["why"]) for one in read("rejected.jsonl")]
    assert rejected == [("b", "B", "review: rude"), ("c", "C", "review: edited")]
    (pair,) = preference_pairs(tmp_path / "out")  # what a person changed is a preference
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("see", "C")
    assert (facts["kept"], facts["teacher"], facts["edited"], facts["gold"]) == (3, 2, 1, 0)
    review = facts["yields"][-1]
    assert review == {"filter": "review", "in": 4, "out": 3, "reviewed": 3, "rejected": 1, "edited": 1}
    assert (facts["review"]["judged"], facts["review"]["rest"]) == (3, 1)
    assert facts["review"]["wrong"]["value"] == pytest.approx(2 / 3)
    assert len(notes) == 1 and notes[0].startswith("1 verdicts are on answers that are no longer there")


def test_an_answer_that_is_accepted_changes_no_byte(tmp_path: Path) -> None:
    found, texts = rows("a", "b", "c"), {name: [name.upper()] for name in "abc"}
    one = verdicts(found, b=("reject", "B", ""))
    two = one | verdicts(found, a=("accept", "A", ""))
    assert make(found, one).key() == make(found, two).key()
    facts = []
    for name, said in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        facts.append(run(tmp_path / name, make(found, said), texts)[0])
    for file in (tmp_path / "one" / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "out" / file.name).read_bytes(), file.name
    assert [one["review"]["judged"] for one in facts] == [1, 2]
    assert make(found, {}).key() != make(found, one).key()


def test_the_reference_stands_in_for_what_was_rejected(tmp_path: Path) -> None:
    found = rows("a", "b")
    said = verdicts(found, a=("reject", "A", "no"))
    facts, read, _ = run(tmp_path, make(found, said, otherwise="gold"), {"a": ["A"], "b": ["B"]})
    assert [(one["id"], one["text"], one["source"]) for one in read("kept.jsonl")] == [
        ("a", GOLD, "gold"),
        ("b", "B", "teacher"),
    ]
    assert facts["gold"] == 1


def test_other_answers_to_the_same_prompt_stay_and_filters_after_it_see_the_edit(tmp_path: Path) -> None:
    found = rows("a", "b")
    said = verdicts(found, a=("reject", "A", ""), b=("edit", "B", "a much longer text"))
    short = {"kind": "format", "max_chars": 5, "metric": "json-exact", "otherwise": "drop"}
    facts, read, _ = run(tmp_path, make(found, said, short), {"a": ["A", "AA"], "b": ["B"]})
    assert [(one["id"], one["text"]) for one in read("kept.jsonl")] == [("a", "AA")]
    assert [one["why"] for one in read("rejected.jsonl")] == ["review", "review: edited", "format: over 5 characters"]
    assert facts["review"]["rest"] == 1


def test_all_that_is_left_may_be_edited(tmp_path: Path) -> None:
    found = rows("a")
    facts, read, _ = run(tmp_path, make(found, verdicts(found, a=("edit", "A", "B"))), {"a": ["A"]})
    assert read("kept.jsonl")[0]["text"] == "B" and (facts["kept"], facts["teacher"]) == (1, 0)
    assert facts["review"]["wrong"] is None


def test_an_answer_with_a_block_is_judged_whole(tmp_path: Path) -> None:
    found = rows("a", "b")
    whole, better = join("think", "it is an A, clearly", "A"), join("think", "it is a B, I think", "B")
    said = verdicts(found, a=("edit", whole, better), b=("reject", "A", "the block was not shown"))
    _, read, _ = run(tmp_path, make(found, said, kind=ThinkingFilter), {"a": [whole], "b": [whole]})
    assert [one["text"] for one in read("kept.jsonl")] == [better, whole]


def test_in_a_round_a_verdict_on_the_same_words_counts_and_nothing_is_estimated(tmp_path: Path) -> None:
    found = rows("a", "b")
    said = verdicts(found, a=("reject", "A", "no"))
    facts, read, _ = run(tmp_path, make(found, said, kind=RoundFilter), {"a": ["A", "AA"], "b": ["B"]})
    assert [one["text"] for one in read("kept.jsonl")] == ["AA", "B"]
    assert "review" not in facts and not (tmp_path / "out" / "shown.jsonl").exists()


@pytest.mark.parametrize("spec", [{"kind": "perplexity", "max": 2.0}, {"kind": "reward", "keep": 1}])
def test_what_a_person_wrote_is_graded_by_no_model_and_passes(tmp_path: Path, spec: dict[str, Any]) -> None:
    found = rows("a", "b")
    said = verdicts(found, a=("edit", "A", "better"))
    lines = [{"row": key, "grade": 3.0 if spec["kind"] == "perplexity" else 0.5} for key in ("a-0", "a-1", "b-0")]
    (tmp_path / "grades.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = {"metric": "json-exact", "otherwise": "drop", "grades": Key("b" * 64), **spec}
    _, read, _ = run(tmp_path, make(found, said, after), {"a": ["A", "AA"], "b": ["B"]})
    kept = [(one["id"], one["text"], one["source"]) for one in read("kept.jsonl")]
    assert kept[0] == ("a", "better", "review")
    assert kept[1:] == ([] if spec["kind"] == "perplexity" else [("b", "B", "teacher")])
