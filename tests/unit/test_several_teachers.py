"""Several teachers: one rescues what another failed, one has prompts of its own, and several are mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.data.recovery import failed_prompts
from edgedistill.errors import RecipeError, UsageError
from edgedistill.rows import RowStore
from edgedistill.runner import Reporter, Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from edgedistill.teachers.mixture import MixedTeacher
from edgedistill.teachers.transformers import TransformersTeacher
from edgedistill.training.recipe import load_kept
from edgedistill.training.targets import read_targets
from tests.unit.taught import LOCAL, WORDS, make_taught

KNOWN = 8  # words that the first teacher was taught
RECIPE = """
schema  = 1
name    = "several"
targets = ["laptop-x86"]
[teacher]
model = "path:half"
[[teachers]]
name  = "second"
role  = "ROLE"
model = "path:teacher"
[student]
model = "path:model"
[prompts]
files = ["tagged.jsonl"]
[generate]
max_new_tokens = 12
[[filter]]
kind   = "reference"
metric = "exact"
[score]
n = 12
[distill]
method     = "full"
epochs     = 1
batch_size = 8
loss       = { kd = 1.0, ce = 0.0, temperature = 1.0 }
[suites.words]
files  = ["asked.jsonl"]
metric = "exact"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers: ``teacher`` knows all words, ``half`` the first eight; prompts with tags."""
    folder = make_taught(tmp_path_factory.mktemp("several"))
    (folder / "half.toml").write_text(
        LOCAL.replace('"taught"', '"half"').replace('["rows.jsonl"]\nmethod', f'["rows.jsonl"]\nrows = {KNOWN}\nmethod')
    )
    session = prepare(folder / "half.toml", store=Store(folder / "store"))
    assert not Runner(session.plan.only(session.plan.match("adapt")), session.store).build().failed
    (folder / "half").symlink_to(entry(session, "adapt") / "model")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    tagged = [{**row, "tags": ["late" if at >= KNOWN else "early"]} for at, row in enumerate(rows)]
    (folder / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    return folder


def entry(session: Session, step: str) -> Path:
    (own,) = [one for one in session.plan.steps if step in one.ids]  # a name may be a stage, too
    found = session.store.load(own.key)
    assert found is not None
    return found.path


def built(
    folder: Path, role: str, *, until: str = "distill/1", more: str = "", **overrides: Any
) -> tuple[Session, list[str]]:
    """Build one recipe as far as a step; return the session and the steps that ran."""
    text = RECIPE.replace("ROLE", role).replace('model = "path:teacher"\n', f'model = "path:teacher"\n{more}')
    (folder / f"{role}.toml").write_text(text)
    session = prepare(folder / f"{role}.toml", store=Store(folder / "store"), overrides=overrides)
    outcome = Runner(session.plan.only(session.plan.match(until)), session.store).build()
    assert not outcome.failed, str(outcome.failed)
    return session, list(outcome.ran)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_teacher_rescues_what_the_first_failed(folder: Path) -> None:
    session, _ = built(folder, "recovery")
    kept = {line["id"]: line for line in lines(entry(session, "filter") / "kept.jsonl")}
    assert {name: line["source"] for name, line in kept.items()} == {
        word: "teacher" if at < KNOWN else "second" for at, word in enumerate(WORDS)
    }
    assert all(line["text"] == name for name, line in kept.items())
    assert [line["id"] for line in lines(entry(session, "generate/second") / "rows.jsonl")] == list(WORDS[KNOWN:])
    # What the first one said of them is kept with its reason.
    rejected = lines(entry(session, "filter") / "rejected.jsonl")
    assert {line["id"] for line in rejected} == set(WORDS[KNOWN:])
    facts = session.store.load(session.plan.match("filter")[-1].key)
    assert facts is not None and facts.facts["recovery"] == {"second": {"asked": 4, "good": 4}}
    assert (facts.facts["teacher"], facts.facts["second"], facts.facts["gold"]) == (KNOWN, 4, 0)
    assert built(folder, "recovery")[1] == []


def test_a_teacher_that_knows_nothing_is_rescued_too(folder: Path) -> None:
    session, _ = built(folder, "recovery", until="filter", **{"teacher.model": "path:model"})
    assert {line["source"] for line in lines(entry(session, "filter") / "kept.jsonl")} == {"second"}
    assert not (entry(session, "filter/1") / "kept.jsonl").read_text()


def test_every_text_is_scored_by_the_teacher_that_wrote_it(folder: Path) -> None:
    session, _ = built(folder, "recovery")
    examples, _ = load_kept(entry(session, "filter") / "kept.jsonl", folder / "model")
    found = read_targets(sorted((entry(session, "score") / "targets").glob("*.parquet")), examples)
    for example, targets in zip(examples, found, strict=True):
        writer = folder / ("half" if example.id in WORDS[:KNOWN] else "teacher")
        ((_, expected),) = TransformersTeacher(writer).score([example], n=12, seed=0)
        assert np.array_equal(targets.ids, expected.ids)
        assert targets.logp == pytest.approx(expected.logp, abs=2e-2)


def test_another_filter_asks_neither_teacher_anew(folder: Path) -> None:
    built(folder, "recovery")
    asked = RowStore(folder / "store").counts()["asks"]
    session, ran = built(folder, "recovery", until="filter", **{"filter.0.otherwise": "gold"})
    assert RowStore(folder / "store").counts()["asks"] == asked
    assert "filter" in ran and {line["source"] for line in lines(entry(session, "filter") / "kept.jsonl")} == {
        "teacher",
        "second",
    }


def test_prompts_are_sent_by_their_tags(folder: Path) -> None:
    session, _ = built(folder, "routed", until="filter", more='tags = ["late"]\n')
    for step, expected in (("generate", WORDS[:KNOWN]), ("generate/second", WORDS[KNOWN:])):
        assert [line["id"] for line in lines(entry(session, step) / "rows.jsonl")] == list(expected)
    kept = lines(entry(session, "filter") / "kept.jsonl")
    assert [line["source"] for line in kept] == ["teacher"] * KNOWN + ["second"] * 4


@pytest.mark.parametrize("combine", ["average", "confidence"])
def test_distributions_of_several_teachers_are_mixed(folder: Path, combine: str) -> None:
    session, _ = built(folder, "ensemble", **{"score.combine": combine, "score.kind": "top-k", "score.n": 255})
    kept = lines(entry(session, "filter") / "kept.jsonl")
    assert {line["id"] for line in kept} == set(WORDS)
    examples, _ = load_kept(entry(session, "filter") / "kept.jsonl", folder / "model")
    found = read_targets(sorted((entry(session, "score") / "targets").glob("*.parquet")), examples)
    for example, targets in zip(examples, found, strict=True):
        dense = [_dense(folder / name, example) for name in ("half", "teacher")]
        weights = np.stack([p.max(axis=-1) if combine == "confidence" else np.ones(len(p)) for p in dense])
        mixed = (np.stack(dense) * (weights / weights.sum(axis=0))[..., None]).sum(axis=0)
        for at in range(len(example.completion_ids)):
            low, high = targets.offsets[at], targets.offsets[at + 1]
            expected = mixed[at, targets.ids[low:high]]
            assert np.exp(targets.logp[low:high]) == pytest.approx(expected, abs=4e-2)  # the teachers score in bf16


def _dense(model: Path, example: Any) -> np.ndarray:
    """Return a teacher's probabilities [positions, vocabulary] along a completion, by transformers alone."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
    with torch.inference_mode():
        logits = whole(ids).logits[0, len(example.prompt_ids) - 1 : -1]
    return torch.softmax(logits, dim=-1).numpy()


def test_teachers_of_other_tokens_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    from tests.unit.formats.gguf.conftest import make_model

    make_model(tmp_path / "other", pre="gpt-2")
    with pytest.raises(UsageError, match="different tokenizers"):
        MixedTeacher([folder / "half", tmp_path / "other"], combine="average")


@pytest.mark.parametrize(
    ("role", "more", "overrides", "message"),
    [
        ("routed", "", {}, "tags"),
        ("recovery", 'tags = ["late"]\n', {}, "tags"),
        ("recovery", "", {"score.combine": "average"}, "nothing to combine"),
        ("recovery", "", {"filter": []}, "nothing tells which answers failed"),
        ("recovery", "", {"generate.style": "tool-trace"}, "one teacher's"),
    ],
)
def test_what_teachers_cannot_do_is_refused(
    folder: Path, role: str, more: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        built(folder, role, more=more, **overrides)


def test_names_of_teachers_are_their_own(folder: Path) -> None:
    text = RECIPE.replace("ROLE", "recovery")
    for name, message in (("gold", "take another name"), ("round-1", "take another name"), ("Second", "name")):
        (folder / "named.toml").write_text(text.replace('"second"', f'"{name}"'))
        with pytest.raises(RecipeError, match=message):
            prepare(folder / "named.toml", store=Store(folder / "store"))


def test_prompts_that_nobody_should_teach_are_not_asked_again() -> None:
    kept = [{"id": "a", "source": "teacher"}, {"id": "b", "source": "gold"}, {"id": "e", "source": "hedge"}]
    rejected = [
        {"id": "a", "why": "reference (exact)"},
        {"id": "b", "why": "did not end"},
        {"id": "c", "why": "pii: e-mail address"},
        {"id": "d", "why": "decontaminate: as in test t1"},
        {"id": "e", "why": "reference (exact)"},
        {"id": "f", "why": "refusals"},
    ]
    assert failed_prompts("abcdefg", kept, rejected) == {"b", "e", "f"}


def test_data_stats_tell_what_recovery_brought(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(folder, "recovery")
    monkeypatch.setenv("EDGEDISTILL_STORE", str(folder / "store"))
    told = CliRunner().invoke(app, ["data", "stats", str(folder / "recovery.toml"), "--json"])
    assert told.exit_code == 0, told.output
    stats = json.loads(told.stdout)
    assert stats["sources"] == {"teacher": KNOWN, "second": 4}
    assert stats["answers"] == 12 + 4  # the second one was asked what the first failed
    groups = {one["of"]: (one["prompts"], one["before"], one["after"]) for one in stats["difficulty"]}
    assert groups["late"] == (4, 0, 4)
    assert groups["early"] == (KNOWN, KNOWN, KNOWN)
    entropy = stats["entropy"]
    assert entropy["nats_per_token"] >= 0 and entropy["estimate"]["n"] == KNOWN + 4  # prompts
    tags = {one["tag"]: (one["n"], one["tokens"]) for one in entropy["by_tag"]}
    assert tags["late"][0] == 4 and sum(tokens for _, tokens in tags.values()) == entropy["tokens"]
    ends = [one["nats_per_token"] for one in (*entropy["lowest"], *reversed(entropy["highest"]))]
    assert len(ends) == 6 and ends == sorted(ends)
    assert stats["spent"] == {}  # both teachers are here
    table = CliRunner().invoke(
        app, ["data", "stats", str(folder / "recovery.toml"), "--production", str(folder / "asked.jsonl")]
    )
    assert (
        table.exit_code == 0
        and "after recovery" in table.stdout
        and "production (n = 12, 12 different)" in table.stdout
    )
    assert "12 different prompts are too few to tell them apart by" in table.stdout


def test_a_second_teacher_may_have_to_prove_itself(folder: Path) -> None:
    session, _ = built(folder, "recovery", until="generate/second", more="min_score = { words = 0.5 }\n")
    scored = json.loads((entry(session, "evaluate/teacher-second") / "scores.json").read_text())
    assert scored
    with pytest.raises(AssertionError, match="nothing is generated"):
        built(
            folder,
            "recovery",
            until="generate/second",
            more="min_score = { words = 1.0 }\n",
            **{"teachers.0.model": "path:model"},
        )


def test_a_pilot_tells_of_the_whole_and_pays_nothing_twice(folder: Path) -> None:
    class Told(Reporter):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    alone = RECIPE.replace(RECIPE[RECIPE.index("[[teachers]]") : RECIPE.index("[student]")], "")
    (folder / "pilot.toml").write_text(alone.replace("[generate]\n", "[generate]\npilot = 0.5\n"))
    session = prepare(folder / "pilot.toml", store=Store(folder / "pilot-store"))
    outcome = Runner(session.plan.only(session.plan.match("filter")), session.store, Told()).build()
    assert not outcome.failed
    assert outcome.ran.index("filter/pilot") < outcome.ran.index("generate")
    assert [line["id"] for line in lines(entry(session, "generate/pilot") / "rows.jsonl")] == list(WORDS[::2])
    told = next(note for note in Told.notes if "pilot" in note)
    seconds = json.loads((entry(session, "generate/pilot") / "entry.json").read_text())["seconds"]
    assert f"about {2 * seconds / 60:.1f} min" in told  # of half of the prompts
    assert (
        "4 of 6 prompts have an answer that passes; of all 12 about 8" in told
    )  # every other one of 12, of which 8 are known
    assert RowStore(folder / "pilot-store").counts() == {"rows": 12, "asks": 12}
    plain = prepare(folder / "pilot.toml", store=session.store, overrides={"generate.pilot": None})
    assert plain.plan.match("generate")[0].key == session.plan.match("generate")[0].key
    with pytest.raises(RecipeError, match="single prompts"):
        prepare(folder / "pilot.toml", store=session.store, overrides={"generate.style": "tool-trace", "filter": []})
