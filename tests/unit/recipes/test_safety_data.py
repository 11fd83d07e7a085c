"""Check the data of the recipe ``safety``: it is what its generator makes, it is balanced, and nothing leaks."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from hashlib import sha256
from typing import Any

import pytest

from edgedistill.data.augmenters import REFUSING
from edgedistill.data.filters import personal, refuses, words_of
from edgedistill.evals.stance import STANCES, stance_of
from edgedistill.recipes.safety import make_data, wordings

DIGESTS = {
    "train": "8e0df9d90394193e",
    "dev": "85feec60a1e61ba7",
    "holdout": "3f07f9d898b0d1bc",
    "ood": "abc45c7cf8b07a02",
}
KINDS = {"account", "tracking", "restricted", "payment", "threat"}
WAYS = {"role play", "for a friend", "urgency", "authority"}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (make_data.HERE / "data" / f"{name}.jsonl").read_text().splitlines()]


def request(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def test_the_generator_makes_the_shipped_files_and_they_are_what_they_were() -> None:
    assert make_data.main(["--check"]) == 0
    assert {name: len(rows(name)) for name in make_data.SIZES} == make_data.SIZES
    files = {name: (make_data.HERE / "data" / f"{name}.jsonl").read_bytes() for name in make_data.SIZES}
    assert {name: sha256(content).hexdigest()[:16] for name, content in files.items()} == DIGESTS


def test_a_changed_file_is_seen(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_data.main(["--out", str(tmp_path)]) == 0
    path = tmp_path / "data" / "dev.jsonl"
    path.write_text(path.read_text().replace("help", "hide", 1))
    assert make_data.main(["--check", "--out", str(tmp_path)]) == 1
    assert "dev.jsonl: differs" in capsys.readouterr().err


def test_no_request_stands_in_two_files_or_twice_in_one() -> None:
    seen: Counter[tuple[str, ...]] = Counter()
    for name in make_data.SIZES:
        for row in rows(name):
            before = [way for ways in wordings.WRAPPED.values() for way in ways] + [
                f"{p}{{x}}" for p in make_data.POLITE if p
            ]
            text = request(row)
            for way in before:  # whatever is said before it
                shape = re.escape(way).replace(r"\{x\}", "(?P<x>.*)").replace(r"\{w\}", "[A-Z][a-z]+")
                text = found["x"] if (found := re.fullmatch(shape, text)) else text
            seen[tuple(words_of(text))] += 1
    assert len(seen) == sum(make_data.SIZES.values()) and set(seen.values()) == {1}


def test_ood_has_wordings_and_words_around_them_that_train_never_saw() -> None:
    def fixed(texts: set[str]) -> set[str]:
        """Return wordings without their slots."""
        return {" ".join(words_of(re.sub(r"\{\w+\}", " ", text))) for text in texts}

    taught = fixed({one.text for group in make_data.TAUGHT for one in group})
    new = fixed({one.text for group in make_data.NEVER_TAUGHT for one in group})
    assert not taught & new and len(new) >= 40
    said = " ".join(request(row) for row in rows("train"))
    around = [re.sub(r"\{\w\}", "", one).strip(" .!?") for ways in wordings.WRAPPED.values() for one in ways]
    assert not [one for one in around if one.split("  ")[0] in said]


@pytest.mark.parametrize("name", sorted(make_data.SIZES))
def test_the_metric_reads_every_reference_as_its_tag_says(name: str) -> None:
    for row in rows(name):
        stance = [tag for tag in row["tags"] if tag in STANCES]
        assert stance == [stance_of(row["reference"])], row["id"]
        assert refuses(row["reference"]) == (stance == ["refuse"]) == (REFUSING in row["tags"]), row["id"]
        assert (len(KINDS & set(row["tags"])) == 1) == (stance == ["refuse"]), row["id"]
        assert not personal(request(row) + " " + row["reference"]), row["id"]
        sentences = re.findall(r"[.?!](?: |$)", row["reference"])
        assert len(sentences) == {"help": 1, "refuse": 2, "ask": 1}[stance[0]], row["id"]
        assert "{" not in request(row) + row["reference"]


@pytest.mark.parametrize("name", sorted(make_data.SIZES))
@pytest.mark.parametrize("part", [1, 4])
def test_every_file_and_its_first_quarter_are_balanced(name: str, part: int) -> None:
    found = rows(name)[: make_data.SIZES[name] // part]
    tags = Counter(tag for row in found for tag in row["tags"])
    quarter = len(found) // 4
    assert (tags["ordinary"], tags["borderline"], tags["refuse"], tags["ask"]) == (quarter,) * 4
    kinds = [tags[kind] for kind in KINDS]
    assert max(kinds) - min(kinds) <= 2
    if name != "ood":
        assert abs(tags["unclear"] - tags["doubtful"]) <= 1 and not WAYS & tags.keys()
        return
    assert tags["wrapped"] == len(found) // 2
    for stance in ("help", "refuse", "ask"):  # words around a request tell nothing of what is right
        wrapped = Counter(way for row in found if stance in row["tags"] for way in WAYS & set(row["tags"]))
        assert wrapped.keys() == WAYS and max(wrapped.values()) - min(wrapped.values()) <= 2


def test_no_single_word_gives_harm_away() -> None:
    """What only sounds like harm has words of harm: a model that goes by one of them refuses too much."""
    said = {tag: Counter[str]() for tag in ("refuse", "borderline")}
    for row in rows("train"):
        for tag in said.keys() & set(row["tags"]):
            said[tag].update(set(words_of(request(row))))
    for word in ("kill", "track", "attack", "prescription", "password", "euros", "pills"):
        assert said["borderline"][word], word
    commonest = max(said["refuse"], key=lambda word: said["refuse"][word] if not said["borderline"][word] else 0)
    assert said["refuse"][commonest] < 0.25 * sum("refuse" in row["tags"] for row in rows("train")), commonest
