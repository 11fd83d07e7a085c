"""Keys: equal meaning gives equal text, and nothing without a canonical form gets in."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.fingerprint import Key, canonical_json, digest, file_digest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_canonical_json_reads_back_as_the_same_value(value: object) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2, max_size=8), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, int], rng: random.Random) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert digest(dict(items)) == digest(value)


@given(VALUES, VALUES)
def test_different_values_have_different_digests(a: object, b: object) -> None:
    assert (digest(a) == digest(b)) == (canonical_json(a) == canonical_json(b))


@dataclass(frozen=True)
class Pair:
    left: Key
    right: tuple[int, ...]


def test_dataclasses_unfold_and_tuples_are_lists() -> None:
    assert canonical_json(Pair(left=Key("ab"), right=(1, 2))) == '{"left":"ab","right":[1,2]}'


@pytest.mark.parametrize("bad", [Path("x"), b"x", {1, 2}, float("nan"), float("inf"), {1: "x"}, object()])
def test_what_has_no_canonical_form_is_refused(bad: object) -> None:
    with pytest.raises(TypeError, match=r"canonical form|must be strings"):
        canonical_json({"value": bad})


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f").startswith("ba7816bf8f01cfea")
