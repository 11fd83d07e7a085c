"""Augmenters in the plan: what they change and what not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.data.augmenters import turns
from edgedistill.errors import RecipeError
from edgedistill.fingerprint import Key
from edgedistill.recipes import copy_recipe
from edgedistill.stages.augment import Augment
from edgedistill.stages.generate import Generate
from edgedistill.stages.score import Score
from tests.unit.test_plan import changed, make

PASS = [{"kind": "reference", "missing": "pass"}, {"kind": "format", "min_chars": 1}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def guide(folder: Path) -> None:
    """Give the first prompt guidance."""
    file = folder / "data" / "train.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text(json.dumps(json.loads(first) | {"guidance": "Be brief."}) + "\n" + "".join(others))


def test_augmenters_change_what_comes_after_them_and_nothing_before(folder: Path) -> None:
    plain = make(folder, filter=PASS)
    one = make(folder, filter=PASS, prompts__augment=[{"kind": "evol-instruct"}])
    found = changed(plain, one)
    assert {"augment/1-evol-instruct", "generate", "filter", "score", "distill/1", "merge"} <= found
    assert not found & {"base/teacher", "adapt", "evaluate/teacher", "convert/teacher", "measure/teacher"}
    # What is said twice is one step; how many tokens are expected is told by all that follows.
    again = make(folder, filter=PASS, prompts__augment=[{"kind": "evol-instruct", "rounds": 1, "temperature": 0.7}])
    assert changed(one, again) == set()
    assert one.match("generate")[0].work.amount > 1.5 * plain.match("generate")[0].work.amount
    two = make(folder, filter=PASS, prompts__augment=[{"kind": "evol-instruct"}, {"kind": "variations"}])
    assert "augment/1-evol-instruct" not in changed(one, two)
    assert two.match("augment/2-variations")[0].stage.inputs() == (one.match("augment")[0].key,)
    hotter = make(folder, filter=PASS, prompts__augment=[{"kind": "evol-instruct", "temperature": 1.0}])
    assert "augment/1-evol-instruct" in changed(one, hotter)


def test_what_one_key_names_is_made_alike(folder: Path) -> None:
    """The order of a table's names is no part of a key, and stances are shared out in turn."""

    def shared_out(balance: dict[str, float]) -> tuple[Key, list[str]]:
        step = make(folder, filter=PASS, prompts__augment=[{"kind": "red-team", "balance": balance}]).match("augment")[
            0
        ]
        assert isinstance(step.stage, Augment)
        return step.key, turns(step.stage.settings["balance"], 12)

    one, other = {"helpful": 1.0, "refusing": 2.0, "nuanced": 1.0}, {"nuanced": 1.0, "refusing": 2.0, "helpful": 1.0}
    assert shared_out(one) == shared_out(other)
    assert shared_out(one)[1] == turns(one, 12) != turns(other, 12)


def test_a_suite_is_in_the_key_of_what_may_not_repeat_it(folder: Path) -> None:
    tables = [{"kind": "paraphrase"}]
    before = make(folder, filter=PASS, prompts__augment=tables)
    suite = folder / "data" / "holdout.jsonl"
    suite.write_text("".join(suite.read_text().splitlines(keepends=True)[:-1]))
    assert "augment/1-paraphrase" in changed(before, make(folder, filter=PASS, prompts__augment=tables))
    assert changed(make(folder), make(folder, filter=[{"kind": "reference", "otherwise": "gold"}])) == set()


def test_guidance_is_asked_and_not_learnt(folder: Path) -> None:
    plain = make(folder)
    guide(folder)
    guided = make(folder)
    stage, score = guided.match("generate")[0].stage, guided.match("score")[0].stage
    assert isinstance(stage, Generate) and isinstance(score, Score)
    assert stage.rows[0].guidance == "Be brief." and score.guided
    assert {"generate", "score"} <= changed(plain, guided)
    assert "guided" not in plain.match("score")[0].stage.fields()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"score__kind": "dense"}, "score.kind"),
        ({"distill__features": {"weight": 1.0}}, "distill.features"),
    ],
)
def test_guidance_is_refused_where_the_teacher_reads_what_the_student_reads(
    folder: Path, overrides: dict[str, Any], key: str
) -> None:
    with pytest.raises(RecipeError, match=r"guidance") as caught:
        make(folder, filter=PASS, prompts__augment=[{"kind": "red-team"}], **overrides)
    assert f" {key}: " in str(caught.value)
    guide(folder)
    with pytest.raises(RecipeError, match=r"guidance"):
        make(folder, **overrides)


def test_what_deserves_a_word(folder: Path) -> None:
    tables: dict[str, Any] = {"prompts__augment": [{"kind": "evol-instruct"}]}
    only = make(folder, filter=PASS[:1], **tables).warnings
    assert any("no [[filter]] judges" in one for one in only)
    more = make(folder, filter=PASS, round=[{"kind": "self"}], student__vocabulary=20000, **tables).warnings
    assert not any("no [[filter]] judges" in one for one in more)
    assert any("rounds put the rows of prompts.files alone" in one for one in more)
    assert any("spelt in pieces" in one for one in more)
    assert "distill/1" in {
        step.id for step in make(folder, filter=PASS, distill__curriculum="evolution", **tables).steps
    }
    with pytest.raises(RecipeError, match=r'no row of prompts\.files has an "evolution"'):
        make(folder, filter=PASS, distill__curriculum="evolution", prompts__augment=[{"kind": "paraphrase"}])
