"""filter, of answers that think first: the block is judged by itself, and what stands after it as any answer."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.data.filters import supports
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import AFTER, COLLAPSED, LEAST_WORDS, asking_why, split
from edgedistill.errors import StepFailed
from edgedistill.evals.metrics import AFTER_THINKING, find_metric
from edgedistill.stages.filter import Filter


@dataclass(frozen=True, kw_only=True)
class ThinkingFilter(Filter):
    """Filter answers that think first: by what stands after the block, and by the block."""

    style: str

    def flaw(self, answer: Mapping[str, Any]) -> str | None:
        """Say why something is no answer at all: it did not end, or its block did not."""
        place = "before" if self.style in AFTER else "after"
        return super().flaw(answer) or (None if split(answer["text"]).answer else f"no answer {place} the block")

    def shown(self, text: str) -> str:
        """Return the answer without its block: what a user sees of it."""
        return split(text).answer

    def passes(
        self, spec: Mapping[str, Any], text: str, reference: str, problem: Mapping[str, Any] | None = None
    ) -> bool:
        """Tell whether one answer passes one filter."""
        if spec["kind"] == "thinking":
            words, most = split(text).words, spec.get("max_words")
            return words >= spec.get("min_words", LEAST_WORDS) and (most is None or words <= most)
        return find_metric(AFTER_THINKING + spec["metric"], self.folder)(text, reference, problem).value == 1.0

    def single(self, spec: Mapping[str, Any]) -> Callable[[Row, str], str]:
        """Return what says why one answer does not pass a filter: of thinking, too, that it comes to something else."""
        judge = super().single(spec)
        if not spec.get("supports"):
            return judge
        return lambda row, text: judge(row, text) or ("" if supports(text) else "thinking: does not come to the answer")

    def lessons(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the text whole, or in the style ``rationale`` the answer, and the rationale as a task of its own."""
        if self.style != "rationale":
            return [line]
        own, gold = split(line["text"]), split(line["reference"] or "")
        answer = {**line, "text": own.answer, "reference": gold.answer or None}
        if own.empty:
            return [answer]
        why = {
            **line,
            "id": f"{line['id']}+why",
            "messages": asking_why(line["messages"]),
            "text": own.thinking,
            "reference": None if gold.empty else gold.thinking,
            "task": "rationale",
        }
        return [answer, why]

    def watch(self, texts: Iterable[str]) -> dict[str, Any]:
        """Measure how much is thought. Thinking that has collapsed in the teacher's answers cannot be taught."""
        import numpy as np

        words, none = array("I"), 0
        for text in texts:
            thought = split(text)
            words.append(thought.words)
            none += thought.empty
        n = len(words)
        empty = none / n if n else 0.0
        if empty > COLLAPSED:
            raise StepFailed(
                f"thinking has collapsed: {empty:.0%} of the {self.writer()}'s {n} answers have an empty block, or none",
                'give adapt.files rows with a "rationale", allow more generate.max_new_tokens, or set generate.style = "answer"'
                if self.writer() == "teacher"
                else "weigh thinking up (distill.think_weight), or lower the round's temperature",
            )
        ordered = np.sort(np.frombuffer(words or array("I", [0]), dtype=np.uint32))
        low, high = (int(ordered[at]) for at in ((len(ordered) - 1) // 2, len(ordered) // 2))
        return {"thinking": {"n": n, "empty": empty, "median_words": low if len(ordered) % 2 else (low + high) / 2}}
