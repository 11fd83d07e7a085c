"""A review from end to end on made-up answers, without its page: filter, judge, filter again, judge on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.verdicts import Verdict, add_verdict, read_verdicts, told
from edgedistill.errors import RecipeError, UsageError
from edgedistill.report import collect
from edgedistill.report_work import training_sheet
from edgedistill.review import Review, open_review
from edgedistill.runner import Runner
from edgedistill.session import prepare
from tests.unit.reviewed import BY_PEOPLE, RECIPE, ROWS, answer, make_answered


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEDISTILL_STORE", str(tmp_path / "store"))
    return make_answered(tmp_path, tmp_path / "store")


def build(recipe: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Run the filter and nothing else; return its facts, what it kept, and which steps ran."""
    session = prepare(recipe)
    outcome = Runner(session.plan.only(session.plan.match("filter")), session.store).build()
    assert not outcome.failed
    entry = session.store.load(session.plan.match("filter")[0].key)
    assert entry is not None
    lines = [json.loads(line) for line in (entry.path / "kept.jsonl").read_text().splitlines()]
    return dict(entry.facts), lines, [str(step) for step in outcome.ran]


def judge(review: Review, kind: str, at: int, **more: Any) -> dict[str, Any]:
    return review.judge({"key": review.items[at]["key"], "verdict": kind, **more})


def test_filter_review_filter_and_on(recipe: Path) -> None:
    facts, kept, _ = build(recipe)
    assert (facts["teacher"], facts["gold"]) == (ROWS - 1, 1) and "review" not in facts
    review = open_review(recipe, count=6, by="mia")
    assert len(review.items) == 6 and len(review.every) == ROWS - 1  # row 0 is wrong: nobody is shown it
    assert "row-00" not in {item["id"] for item in review.items}
    judge(review, "accept", 0)
    judge(review, "reject", 1, reason="not at that hour")
    judge(review, "edit", 2, text='{"name": "none"}')
    assert review.state()["done"] == 3 and review.file == recipe.parent / "tiny.review.jsonl"
    rejected, edited = review.items[1]["id"], review.items[2]["id"]
    # Until the recipe says so, verdicts are no filter.
    assert build(recipe)[1:] == (kept, [])

    recipe.write_text(RECIPE + BY_PEOPLE)
    facts, after, ran = build(recipe)
    assert ran == ["filter"]
    by_id = {line["id"]: line for line in after}
    assert (by_id[edited]["text"], by_id[edited]["source"]) == ('{"name": "none"}', "review")
    assert by_id[rejected]["source"] == "gold"
    assert [line for line in after if line["id"] not in (rejected, edited)] == [
        line for line in kept if line["id"] not in (rejected, edited)
    ]
    assert facts["yields"][-1] | {"in": 0, "out": 0} == {
        **{"filter": "review", "in": 0, "out": 0},
        **{"reviewed": 3, "rejected": 1, "edited": 1},
    }
    assert (facts["review"]["judged"], facts["review"]["rest"]) == (3, ROWS - 1 - 3)

    # A second session shows the same answers, as they were, and goes on.
    again = open_review(recipe, count=8, by="tom")
    assert [item["key"] for item in again.items[:6]] == [item["key"] for item in review.items]
    assert again.done == 3 and again.found() == review.found()
    judge(again, "accept", 3)
    assert build(recipe)[2] == []  # what is accepted builds nothing anew
    data = collect(prepare(recipe))
    assert data.yields["review"]["judged"] == 4  # and the report knows it all the same
    assert told(data.yields["review"]) == told(again.to_json())
    assert {one.by for one in read_verdicts(again.file).values()} == {"mia", "tom"}
    # A change of mind.
    judge(again, "accept", 1)
    assert {line["id"]: line for line in build(recipe)[1]}[rejected]["source"] == "teacher"


def test_the_report_says_it_in_a_line(recipe: Path) -> None:
    recipe.write_text(RECIPE + BY_PEOPLE)
    (recipe.parent / "tiny.review.jsonl").touch()
    build(recipe)
    review = open_review(recipe, by="")
    judge(review, "accept", 0)
    data = collect(prepare(recipe))
    data.training["distill/1"] = {"method": "lora"}
    assert f"review: {told(review.found())}" in training_sheet(data).notes
    # One of eleven says next to nothing: were all the others wrong, it would be the right one in one draw of eleven.
    assert told(review.found()) == "0 wrong of 1 judged: at most 100.0 % of 10 others are wrong (95 %)"


def test_a_verdict_on_what_has_changed_does_not_count(recipe: Path) -> None:
    review = open_review(recipe, by="")
    add_verdict(review.file, Verdict(id=review.items[0]["id"], shown="f" * 16, verdict="reject"))
    other = open_review(recipe, by="")
    assert (other.done, other.to_json()["stale"], other.to_json()["judged"]) == (0, 1, 0)


def test_before_the_teacher_has_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    monkeypatch.setenv("EDGEDISTILL_STORE", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="nothing is filtered yet") as error:
        open_review(recipe)
    assert error.value.hint == f"edgedistill build {recipe} --until filter"
    recipe.write_text(RECIPE + BY_PEOPLE)
    with pytest.raises(UsageError) as error:
        open_review(recipe)
    # `build` refuses a file that is not there.
    assert error.value.hint == f"touch {tmp_path / 'tiny.review.jsonl'} && edgedistill build {recipe} --until filter"


def test_plan_refuses_a_file_that_is_not_there_or_malformed_and_notes_rows_that_are_gone(recipe: Path) -> None:
    recipe.write_text(RECIPE + BY_PEOPLE)
    file = recipe.parent / "tiny.review.jsonl"
    with pytest.raises(RecipeError, match=r"filter\.1\.file: .*tiny\.review\.jsonl: no such file") as error:
        prepare(recipe)
    assert error.value.hint == f"edgedistill review {recipe}"
    add_verdict(file, Verdict(id="row-99", shown="0" * 16, verdict="accept"))
    add_verdict(file, Verdict(id="row-01", shown="0" * 16, verdict="accept"))
    assert [text for text in prepare(recipe).plan.warnings if "verdicts" in text] == [
        "tiny.review.jsonl: 1 of 2 verdicts are on rows that the prompts no longer have"
    ]
    file.write_text(file.read_text() + "\n{oops\n")
    with pytest.raises(RecipeError, match=r"tiny\.review\.jsonl:4: no JSON object"):
        prepare(recipe)
    with pytest.raises(UsageError, match=r"tiny\.review\.jsonl:4: no JSON object"):
        open_review(recipe)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ('[[filter]]\nkind = "review"', r'set file = "NAME\.review\.jsonl"'),
        ('[[filter]]\nkind = "pii"\nfile = "x.jsonl"', r'file: this is for kind = "review"'),
    ],
)
def test_filters_that_say_too_little_or_too_much(recipe: Path, filters: str, message: str) -> None:
    recipe.write_text(f"{RECIPE}{filters}\n")
    with pytest.raises(RecipeError, match=message):
        prepare(recipe)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "a verdict is one of"),
        ({"verdict": "maybe"}, "a verdict is one of"),
        ({"verdict": "accept", "key": "row-01 0"}, "not in this sample"),
        ({"verdict": "accept", "key": ["a"]}, "not in this sample"),
        ({"verdict": "edit", "text": " \n"}, "needs a text"),
        ({"verdict": "edit", "text": 3}, "text is no text"),
        ({"verdict": "reject", "reason": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_what_is_no_verdict_is_not_written_down(recipe: Path, body: Any, message: str) -> None:
    review = open_review(recipe, by="")
    if isinstance(body, dict):
        body = {"key": review.items[0]["key"], **body}
    with pytest.raises(ValueError, match=message):
        review.judge(body)
    with pytest.raises(ValueError, match="as it was: accept it"):
        judge(review, "edit", 0, text=review.items[0]["text"])
    assert not review.file.exists() and review.done == 0


def test_an_edit_that_is_no_json_is_warned_of_once(recipe: Path) -> None:
    review = open_review(recipe, by="")
    assert judge(review, "edit", 0, text="at six") == {"saved": False, "warning": "This is not JSON."}
    assert not review.file.exists()
    assert judge(review, "edit", 0, text="at six", sure=True)["saved"]
    assert judge(review, "edit", 1, text=answer(77))["saved"]
    assert [one.text for one in read_verdicts(review.file).values()] == ["at six", answer(77)]


def test_a_block_that_is_gone_is_warned_of() -> None:
    whole = "<think>\nhalf past six\n</think>\n\nsix"
    item = {"key": "a 0", "text": whole, "answer": "six", "reference": None}
    review = Review(name="", file=Path("/nowhere"), items=[item], every={"a 0": ""}, style="think")
    assert "is gone" in judge(review, "edit", 0, text="seven")["warning"]
    assert "Nothing but the block" in judge(review, "edit", 0, text="<think>\nhalf past six\n</think>\n")["warning"]
