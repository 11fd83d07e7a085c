"""Near duplicates by vectors, against the plain comparison of all pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgedistill.data.near import Near, Vectors, near_duplicates
from edgedistill.data.prompts import Row


def unit(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Return vectors in small groups around a few directions, so that many are near one another."""
    middle = rng.normal(size=(12, size))
    found = middle[rng.integers(0, 12, count)] + rng.normal(size=(count, size)) * rng.choice([0.05, 0.4], (count, 1))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, 64, 300])
@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.99])
def test_those_near_one_before_are_those_of_the_plain_comparison_in_blocks_of_any_size(
    block: int, similarity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.data.near.SHEET", 100)  # a dozen of vectors in memory at once
    vectors = unit(np.random.Generator(np.random.Philox(0)), 300, 8)
    plain: list[bool] = []
    kept: list[np.ndarray] = []
    for one in vectors.astype(np.float64):
        near = any(one @ other / np.linalg.norm(one) / np.linalg.norm(other) >= similarity for other in kept)
        plain.append(near)
        kept += [] if near else [one]
    seen = Near(similarity, 8)
    found = [near for at in range(0, 300, block) for near in seen.before(vectors[at : at + block])]
    assert found == plain and 0 < sum(plain) < 300 and seen.count == 300 - sum(plain)


def test_the_same_vector_is_near_at_any_similarity_and_no_vectors_are_none() -> None:
    vectors = unit(np.random.Generator(np.random.Philox(1)), 50, 384)
    seen = Near(1.0, 384)
    assert not any(seen.before(vectors)) and all(seen.before(vectors)) and seen.before(vectors[:0]) == []


def entry(folder: Path, keys: list[str], vectors: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "vectors.json").write_text(json.dumps({"size": vectors.shape[1], "count": len(vectors)}))
    (folder / "vectors.f32").write_bytes(vectors.tobytes())
    (folder / "keys.txt").write_text("".join(key + "\n" for key in keys))
    return folder


def test_answers_of_several_teachers_are_judged_by_their_vectors_and_one_that_a_person_wrote_passes(
    tmp_path: Path,
) -> None:
    east, north, west = np.eye(4, dtype=np.float32)[0], np.eye(4, dtype=np.float32)[1], -np.eye(4, dtype=np.float32)[0]
    folders = [
        entry(tmp_path / "a", ["a0", "a1"], np.stack([east, north])),
        entry(tmp_path / "none", [], np.zeros((0, 4), dtype=np.float32)),
        entry(tmp_path / "b", ["b0", "b1"], np.stack([west, east])),
    ]
    vectors, numbers = Vectors(folders).of(["b1", "?", "a1", "b0"])
    assert numbers == [0, 2, 3] and vectors.tolist() == [east.tolist(), north.tolist(), west.tolist()]
    row, other = (Row(id=name, messages=()) for name in "xy")
    answers = [{"row": key} for key in ("a0", "a1", "", "b0", "b1", "")]
    block = [(row, answers[:3]), (other, answers[3:])]
    judge = near_duplicates(folders, 0.9, tmp_path)(block, 0)
    assert [why for one, found in block for _, why in judge(one, found)] == ["", "", "", "", "duplicates", ""]
