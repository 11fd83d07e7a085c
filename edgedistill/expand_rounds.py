"""The rounds after the first distillation: the student so far is asked, new rows are chosen, scored and learnt.

Each round is steps of the stages that the first distillation is made of; what differs is who is asked what.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgedistill.data.prompts import rows_digest
from edgedistill.data.thinking import BLOCKS
from edgedistill.evals.metrics import AFTER_THINKING
from edgedistill.expand_grades import GradeSteps
from edgedistill.fingerprint import Key
from edgedistill.inputs import keyed_metric
from edgedistill.rates import MIB, RUNTIME_MIB, Work, row_tokens
from edgedistill.recipe_distill import Round
from edgedistill.stages.evaluate import Evaluate, SuiteSpec
from edgedistill.stages.filter_rounds import RoundFilter, ThinkingRoundFilter
from edgedistill.stages.generate import Generate, GenerateFailed

PROMPTS = "prompts"  # the name of the prompts as a suite
FAILED = 0.25  # share of the prompts that a student is assumed to fail, for estimates


class RoundSteps(GradeSteps):
    """Adds the rounds of the recipe, for the last student."""

    def _rounds(self, student: Key, kept: Key, *, teacher: Key, params: int, above: Key, done: int) -> Key:
        """Add the rounds in their order, each from the student that the one before it left; return the last one's.

        ``teacher``, of ``params`` parameters, answers anew; ``above`` gives the distributions, as it did for the last of the
        ``done`` distillations before.
        """
        tokens, asked = self.tokens, sum(map(row_tokens, self.inputs.prompts))
        for number, one in enumerate(self.recipe.round, 1):
            tag = f"round-{number}"
            if one.kind == "self":
                answers = self._self(tag, one, student, number)
            else:
                answers = self._online(tag, one, student, number, teacher, params)
            kept = self._round_filter(tag, one, answers, kept)
            replayed = one.replay * self.tokens if one.kind == "online" else 0
            self.tokens = int(asked * one.keep * (1 if one.kind == "self" else FAILED) + replayed)
            targets = self._score(f"score/{tag}", above, kept)
            last = number == len(self.recipe.round)
            student = self._distill(
                f"distill/{done + number}",
                "merge" if last else f"merge/{done + number}",
                student,
                kept,
                targets,
                teacher=self._beside(above),
                states=self._states(f"states/{tag}", above, kept),
            )
        self.tokens = tokens
        return student

    def _self(self, tag: str, one: Round, student: Key, number: int) -> Key:
        """Add the student's answers to all prompts."""
        return self._ask(tag, one, Generate(**self._question(one, student, number)), "decode", self.s_params)

    def _online(self, tag: str, one: Round, student: Key, number: int, teacher: Key, params: int) -> Key:
        """Add the student's greedy answers to all prompts, judged by the reference, and the teacher's to those it fails."""
        rows, generate = self.inputs.prompts, self.recipe.generate
        own = next(spec.metric for spec in self.recipe.filter if spec.kind == "reference")
        metric = keyed_metric(self.inputs, own, "filter")
        suite = SuiteSpec(
            name=PROMPTS,
            digest=rows_digest(rows),
            metric=AFTER_THINKING + metric if generate.style in BLOCKS else metric,
            max_new_tokens=generate.max_new_tokens,
        )
        judged = self.graph.add(
            f"evaluate/{tag}",
            Evaluate(
                model=student,
                file="model",
                suites=(suite,),
                shots=(),
                references={},
                build="transformers",
                isa=self.isa,
                rows={PROMPTS: rows},
                folder=self.inputs.path.parent,
            ),
            Work(kind="decode", amount=2 * self.s_params * sum(map(row_tokens, rows))),
            memory=4 * self.s_params + RUNTIME_MIB * MIB,
            disk=len(rows) * 400,
        )
        asked = self._question(one, teacher, number)
        by = {"server": self.server, "manner": self.manner, **self._calls(rows)}
        stage = GenerateFailed(**asked, **by, student=judged, suite=PROMPTS)
        return self._ask(tag, one, stage, "decode-failed", params)

    def _question(self, one: Round, asked: Key, number: int) -> dict[str, Any]:
        """Return the fields of a round's step of generate. Another seed than before: the answers are other draws."""
        table = self._generate() | {"samples": one.samples, "temperature": one.temperature}
        if one.kind == "self":
            table.pop("json_schema", None)  # the student writes freely
        rows = self.inputs.prompts
        if one.kind == "self" and any(row.guidance for row in rows):  # the student answers without
            rows = tuple(replace(row, guidance=None) for row in rows)
        return {
            **table,
            "teacher": asked,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "seed": self.recipe.seed + number,
            "scores": None,  # the teacher was proved before it first answered, and the student need not be
            "min_score": {},
        }

    def _ask(self, tag: str, one: Round, stage: Generate, kind: str, params: int) -> Key:
        rows = self.inputs.prompts
        return self.graph.add(
            f"generate/{tag}",
            stage,
            Work(kind=kind, amount=2 * params * sum(map(row_tokens, rows)) * one.samples)
            if stage.server is None
            else Work(kind="served", amount=FAILED * sum(map(row_tokens, rows)) * one.samples),
            memory=2 * params + RUNTIME_MIB * MIB,
            disk=len(rows) * one.samples * 600,
        )

    def _round_filter(self, tag: str, one: Round, answers: Key, before: Key) -> Key:
        rows, style, online = self.inputs.prompts, self.recipe.generate.style, one.kind == "online"
        fields: dict[str, Any] = {
            "answers": answers,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "filters": self._graded_filters(self._grades(answers, self.tokens, tag), one.samples),
            "suites": self.inputs.suites,
            "folder": self.inputs.path.parent,
            "reviews": self._reviews(),
            "by": "teacher" if online else "student",
            "keep": one.keep,
            "before": before if online and one.replay else None,
            "replay": one.replay if online else 0.0,
        }
        return self.graph.add(
            f"filter/{tag}",
            ThinkingRoundFilter(**fields, style=style) if style in BLOCKS else RoundFilter(**fields),
            Work(kind="bytes", amount=len(rows) * one.samples * 1000.0),
            disk=len(rows) * (one.keep + online) * 800,
        )
