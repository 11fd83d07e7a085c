"""The steps that make text: the teacher's answers, what the filters keep of them, and what it says of its mistakes."""

from __future__ import annotations

from typing import Any

from edgedistill.data.prompts import rows_digest
from edgedistill.data.thinking import BLOCKS
from edgedistill.expand_training import TrainingSteps
from edgedistill.fingerprint import Key
from edgedistill.rates import MIB, RUNTIME_MIB, Work
from edgedistill.stages.analyse import Analyse
from edgedistill.stages.filter import Filter, ThinkingFilter
from edgedistill.stages.generate import Generate, GenerateAnalyses

WRONG = 0.2  # share of answers that a teacher is assumed to get wrong, for estimates


class TextSteps(TrainingSteps):
    """Adds what comes of asking the teacher."""

    def _text(self, teacher: Key, scores: Key) -> Key:
        """Add the teacher's answers and the filters; return what is kept. ``scores`` is the teacher's evaluation."""
        recipe, rows = self.recipe, self.inputs.prompts
        question: dict[str, Any] = {
            "teacher": teacher,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "seed": recipe.seed,
            "server": self.server,
            "manner": self.manner,
            **self._calls(rows),
            **self._generate(),
        }
        answers = self._asked(
            "generate", Generate(**question, scores=scores, min_score=recipe.teacher.min_score), self.tokens
        )
        style = recipe.generate.style
        analysed = next((one for one in recipe.filter if one.analysis), None)
        filtered: dict[str, Any] = {
            "answers": answers,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "filters": self._filters(recipe.generate.samples, analysed=True),
            "suites": self.inputs.suites,
        }
        kept = self.graph.add(
            "filter",
            ThinkingFilter(**filtered, style=style) if style in BLOCKS else Filter(**filtered),
            Work(kind="bytes", amount=len(rows) * 1000.0),
            disk=len(rows) * 800,
        )
        if analysed is None:
            return kept
        told = GenerateAnalyses(
            **{**question, "samples": 1}, scores=None, min_score={}, filtered=kept, corrections=analysed.corrections
        )
        stage = Analyse(
            kept=kept,
            analyses=self._asked("generate/analyses", told, WRONG * self.tokens),
            rows_digest=rows_digest(rows),
            corrections=analysed.corrections,
            metric=analysed.metric,
            rows=rows,
        )
        return self.graph.add("analyse", stage, Work(kind="bytes", amount=len(rows) * 1000.0), disk=len(rows) * 800)

    def _asked(self, name: str, stage: Generate, tokens: float) -> Key:
        """Add a step in which the teacher writes so many tokens, prompts included."""
        return self.graph.add(
            name,
            stage,
            Work(kind="served", amount=tokens)
            if self.server
            else Work(kind="decode-gguf" if self.in_gguf else "decode", amount=2 * self.t_params * tokens),
            memory=2 * self.t_params + RUNTIME_MIB * MIB,
            disk=len(self.inputs.prompts) * stage.samples * 600,
        )
