"""Verdicts: the file, the sample, and what a sample says of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.verdicts import Verdict, add_verdict, changes, read_verdicts, remaining, sample, shown_key, told
from edgedistill.errors import UsageError

ASKED = [{"role": "user", "content": "wake me"}]


def verdict(name: str, kind: str = "accept", **more: str) -> Verdict:
    return Verdict(id=name, shown="0" * 16, verdict=kind, **more)


def test_the_last_verdict_counts_and_nothing_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "phone.review.jsonl"
    for one in (
        verdict("a", "reject", reason="naïve"),
        verdict("b"),
        verdict("a", "edit", text="six\nseven", by="mia"),
    ):
        add_verdict(file, one)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    found = read_verdicts(file)
    assert {key: one.verdict for key, one in found.items()} == {
        "b 0000000000000000": "accept",
        "a 0000000000000000": "edit",
    }
    assert found["a 0000000000000000"].text == "six\nseven"
    assert "naïve" in file.read_text(encoding="utf-8")  # plain, for those who read diffs


def test_a_line_that_an_editor_left_open_is_ended_first(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    add_verdict(file, verdict("a"))
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    add_verdict(file, verdict("b"))
    assert len(read_verdicts(file)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        ('{"id": "a", "verdict": "accept"}', "shown is missing"),
        ('{"id": "a", "shown": "0", "verdict": "maybe"}', "no verdict 'maybe'"),
        ('{"id": "a", "shown": "0", "verdict": "edit"}', "an edit without its text"),
        ('{"id": "a", "shown": "0", "verdict": "accept", "colour": "red"}', "'colour' is no field"),
        ('{"id": 1, "shown": "0", "verdict": "accept"}', "id is no text"),
        ('{"id": "a", "shown": "0", "verdict": "accept", "sample": "odd"}', "no sample 'odd'"),
        ('{"id": "\xff"}', "no JSON object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "r.jsonl"
    add_verdict(file, verdict("a"))
    with file.open("ab") as handle:
        handle.write(b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match=message) as error:
        read_verdicts(file)
    assert str(error.value).startswith(f"{file}:3: ") and error.value.hint


def test_a_verdict_is_on_what_was_shown() -> None:
    key = shown_key("r", ASKED, [], "six")
    assert key == shown_key("r", [dict(reversed(ASKED[0].items()))], [], "six")
    others = [
        shown_key("s", ASKED, [], "six"),
        shown_key("r", ASKED, [], "seven"),
        shown_key("r", [*ASKED, *ASKED], [], "six"),
        shown_key("r", ASKED, [{"type": "function"}], "six"),
    ]
    assert len({key, *others}) == 5


def test_only_what_changes_the_rows_changes_the_digest() -> None:
    def of(*found: Verdict) -> str:
        return changes({one.key: one for one in found})

    assert of(verdict("a", "reject")) == of(
        verdict("b"), verdict("a", "reject", by="mia", when="2026", sample="by-tag")
    )
    different = [of(verdict("a", "reject")), of(verdict("a", "reject", reason="x")), of(verdict("b", "reject")), of()]
    assert len({*different, of(verdict("a", "edit", text="x")), of(verdict("a", "edit", text="y"))}) == 6


@given(st.sets(st.text(min_size=1, max_size=4), min_size=1, max_size=30), st.integers(0, 30), st.booleans())
def test_a_larger_sample_begins_with_a_smaller_one(keys: set[str], count: int, by_tag: bool) -> None:
    tags = {key: key[:1] for key in sorted(keys)}
    whole = sample(tags, 99, 0, by_tag=by_tag)
    assert sorted(whole) == sorted(keys)
    assert sample(dict(reversed(tags.items())), count, 0, by_tag=by_tag) == whole[:count]


def test_a_sample_is_stable_when_rows_are_added_and_another_with_another_seed() -> None:
    few = {f"{n}": "" for n in range(60)}
    more = few | {f"new-{n}": "" for n in range(30)}
    order = sample(more, 90, 0)
    assert [key for key in order if key in few] == sample(few, 60, 0)
    assert sample(few, 10, 1) != sample(few, 10, 0)
    # In no order of the file: of many halves, the mean place of the first half is in the middle.
    places = [place for seed in range(40) for place, key in enumerate(sample(few, 60, seed)) if int(key) < 30]
    assert abs(sum(places) / len(places) - 29.5) < 2


def test_each_tag_in_turn() -> None:
    tags = {f"a{n}": "alarm" for n in range(50)} | {"t0": "timer", "t1": "timer", "n0": "note"}
    first = sample(tags, 6, 0, by_tag=True)
    assert {tags[key] for key in first[:3]} == {"alarm", "timer", "note"}
    assert {tags[key] for key in first[3:5]} == {"alarm", "timer"}
    assert tags[first[5]] == "alarm"


def case(rest: dict[str, int], judged: dict[str, list[str]], drawn: str = "random") -> dict[str, Any]:
    answers = [(f"{tag}-rest-{n}", tag, True) for tag, count in rest.items() for n in range(count)]
    verdicts = {}
    for tag, kinds in judged.items():
        for n, kind in enumerate(kinds):
            one = verdict(f"{tag}-{n}", kind, text="x", sample=drawn)
            verdicts[one.key] = one
            answers.append((one.key, tag, kind == "accept"))
    return remaining(answers, verdicts)


def test_none_wrong_of_fifty() -> None:
    found = case({"": 100_000}, {"": ["accept"] * 50})
    assert (found["judged"], found["accepted"], found["rest"]) == (50, 50, 100_000)
    assert told(found) == "0 wrong of 50 judged: at most 7.1 % of 100,000 others are wrong (95 %)"
    assert json.loads(json.dumps(found)) == found


def test_rejected_and_edited_are_wrong_and_none_of_the_others() -> None:
    found = case({"": 200_000}, {"": ["accept"] * 16 + ["reject"] * 3 + ["edit"]})
    assert (found["accepted"], found["rejected"], found["edited"], found["rest"]) == (16, 3, 1, 200_000)
    assert found["wrong"]["value"] == pytest.approx(0.2)
    # Clopper and Pearson's tables: 4 of 20.
    assert told(found) == "4 wrong of 20 judged: of 200,000 others 20.0 % are wrong, [5.7, 43.7] (95 %)"


def test_nothing_judged_and_nothing_left() -> None:
    assert told(case({"": 7}, {})) == "0 wrong of 0 judged, 7 others are kept"
    found = case({}, {"": ["reject", "accept"]})
    assert found["wrong"] is None and told(found) == "1 wrong of 2 judged, 0 others are kept"


def test_tags_weigh_by_what_is_left_of_them() -> None:
    # 10 of each tag judged: all alarms right, half of the notes wrong; 990 alarms and 10 notes are left.
    judged = {"alarm": ["accept"] * 10, "note": ["accept", "reject"] * 5}
    plain, weighed = case({"alarm": 990, "note": 10}, judged), case({"alarm": 990, "note": 10}, judged, "by-tag")
    assert plain["wrong"]["value"] == pytest.approx(5 / 20)
    assert weighed["wrong"]["value"] == pytest.approx(0.5 * 10 / 1000)
    # Ten alarms say what the sample is worth: 1 / (0.99**2 / 10 + 0.01**2 / 10) = 10.2 answers.
    assert weighed["wrong"]["n"] == 10 and 0.25 < weighed["wrong"]["high"] < 0.5
    assert "weighed by tag" in told(weighed)
    # Equal shares: as good as a random sample of them all.
    even = case({"a": 500, "b": 500}, {"a": ["accept"] * 25, "b": ["accept"] * 25}, "by-tag")
    assert even["wrong"]["n"] == 50 and round(even["wrong"]["high"], 3) == pytest.approx(0.072, abs=2e-3)


def test_of_tags_that_nobody_looked_at_nothing_is_said() -> None:
    found = case({"a": 100, "b": 40}, {"a": ["accept"] * 10}, "by-tag")
    assert (found["rest"], found["unseen_tags"]) == (140, 40)
    assert "of 100 others" in told(found) and "nothing is known of 40 more" in told(found)
    none = case({"b": 40}, {"a": ["accept"] * 10}, "by-tag")
    assert none["wrong"] is None
