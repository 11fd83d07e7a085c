"""The entries of a build by the names of its steps, and the answers in them, paired by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgedistill.fingerprint import Key
from edgedistill.stages.package import Package
from edgedistill.store import Damaged, Entry

if TYPE_CHECKING:
    from edgedistill.session import Session


class Reader:
    """The entries of one plan by step id, each loaded once. What is stale counts as missing: its figures are of other
    bytes.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.steps = {name: step for step in session.plan.steps for name in step.ids}
        self._why: dict[Key, str] = {}
        self._entries: dict[str, Entry | None] = {}
        self._answers: dict[tuple[str, str], dict[str, tuple[float, str]] | None] = {}

    def entry(self, name: str) -> Entry | None:
        if name not in self._entries:
            self._entries[name] = self._load(name) if name in self.steps else None
        return self._entries[name]

    def _load(self, name: str) -> Entry | None:
        step = self.steps[name]
        entry, why = self._found(step.key)
        if why and isinstance(step.stage, Package):  # it missed a gate, and was shipped anyway
            anyway, bad = self._found(step.stage.anyway)
            entry, why = (entry, why) if bad else (anyway, "")
        if why:
            self._why[step.key] = why
        return None if why else entry

    def _found(self, key: Key) -> tuple[Entry | None, str]:
        """Return an entry, and why it is of no use, or ""."""
        store = self.session.store
        try:
            entry = store.load(key)
            return entry, "not built" if entry is None else store.inputs_match(entry)
        except Damaged as error:
            return None, f"damaged: {error.why}"

    def missing(self) -> tuple[list[str], int]:
        """Return the steps that are missing though their inputs are there, with the reason, and the number of those
        that wait.
        """
        steps = [step for step in self.session.plan.steps if self.entry(step.id) is None]
        first = [step for step in steps if not self._why.keys() & set(step.stage.inputs())]
        return [f"{step.id} ({self._why[step.key]})" for step in first], len(steps) - len(first)

    def facts(self, name: str) -> Mapping[str, Any]:
        entry = self.entry(name)
        return entry.facts if entry else {}

    def size(self, name: str) -> int | None:
        """Return the bytes of the model that a step made: ``model.gguf``, or everything under ``onnx/``."""
        entry = self.entry(name)
        return (
            sum(r.size for f, r in entry.files.items() if f == "model.gguf" or f.startswith("onnx/")) if entry else None
        )

    def answers(self, name: str, suite: str) -> dict[str, tuple[float, str]] | None:
        """Return row id -> (score, text) of one evaluation, None if there is none."""
        if (name, suite) not in self._answers:
            entry = self.entry(f"evaluate/{name}")
            path = entry.path / "answers" / f"{suite}.jsonl" if entry else None
            found = None
            if path is not None and path.is_file():
                with path.open(encoding="utf-8") as file:
                    rows = [json.loads(line) for line in file]
                found = {row["id"]: (float(row["score"]), str(row["text"])) for row in rows}
            self._answers[name, suite] = found
        return self._answers[name, suite]

    def briers(self, name: str, suite: str) -> dict[str, float]:
        """Return row id -> Brier score of the labels' probabilities in one evaluation; {} where it has none."""
        from edgedistill.evals.labels import brier, named

        entry, labels = self.entry(f"evaluate/{name}"), self.session.recipe.labels
        path = entry.path / "answers" / f"{suite}.jsonl" if entry else None
        if labels is None or path is None or not path.is_file():
            return {}
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not rows or any("probabilities" not in row["details"] for row in rows):
            return {}
        import numpy as np

        wanted = named([row["reference"] for row in rows], labels.names)
        found = brier(np.asarray([row["details"]["probabilities"] for row in rows]), wanted)
        return {row["id"]: value for row, value in zip(rows, found.tolist(), strict=True)}

    def paired(self, a: tuple[str, str], b: tuple[str, str]) -> tuple[list[float], list[float]] | None:
        """Return two evaluations' scores on the rows that they share; None unless all rows pair up."""
        left, right = self.answers(*a), self.answers(*b)
        if not left or not right or left.keys() != right.keys():
            return None
        return [score for score, _ in left.values()], [right[row][0] for row in left]
