"""The steps that make text: the teacher's answers, what the filters keep of them, and what it says of its mistakes."""

from __future__ import annotations

from typing import Any

from edgedistill.data.prompts import rows_digest
from edgedistill.data.thinking import BLOCKS
from edgedistill.expand_grades import GradeSteps, joined
from edgedistill.expand_prompts import PromptSteps
from edgedistill.expand_training import Other
from edgedistill.fingerprint import Key
from edgedistill.inputs import keyed_metric
from edgedistill.rates import MIB, RUNTIME_MIB, Work
from edgedistill.recipe_labels import CHARACTERS
from edgedistill.recipe_teacher import Teacher
from edgedistill.stages.analyse import Analyse
from edgedistill.stages.filter import Filter
from edgedistill.stages.filter_thinking import ThinkingFilter
from edgedistill.stages.generate import Generate, GenerateAnalyses, GenerateRecovery
from edgedistill.stages.label_filter import LabelFilter
from edgedistill.stages.label_likelihoods import LabelLikelihoods

WRONG = 0.2  # share of answers that a teacher is assumed to get wrong, for estimates


class TextSteps(PromptSteps, GradeSteps):
    """Adds what comes of asking the teacher."""

    def _text(self, teacher: Key, scores: Key) -> Key:
        """Add the teacher's answers and the filters; return what is kept. ``scores`` is the teacher's evaluation."""
        recipe, rows = self.recipe, self.inputs.prompts
        prompts = self._augmented(teacher, scores)
        question: dict[str, Any] = {
            "teacher": teacher,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "prompts": prompts,
            "seed": recipe.seed,
            "server": self.server,
            "manner": self.manner,
            **self._calls(rows),
            **self._generate(),
            **self._labelled(recipe.teacher),
        }
        proved = {"scores": scores, "min_score": recipe.teacher.min_score, "leave": self._routed()}
        pilot = self._pilot({**question, **proved})
        asked = self._generates(**question, **proved, pilot=pilot)
        answers = self._asked("generate", asked, self.tokens + self._said(len(rows)))
        analysed = next((one for one in recipe.filter if one.analysis), None)
        filtered: dict[str, Any] = {
            "answers": answers,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "prompts": prompts,
            "suites": self.inputs.suites,
            "folder": self.inputs.path.parent,
            "reviews": self._reviews(),
        }
        grades = [self._grades(answers, self.tokens, prompts=prompts)]
        filtered["others"] = tuple(
            (one.spec.name, self._asked_another(one, question)) for one in self.others if one.spec.role != "recovery"
        )
        grades += [self._grades(key, self.tokens, name, prompts) for name, key in filtered["others"]]
        filtered["filters"] = self._graded_filters(joined(grades), recipe.generate.samples, analysed=True)
        recovering = [one for one in self.others if one.spec.role == "recovery"]
        kept = self._filter(*("filter/1", {**filtered, "more": True}) if recovering else ("filter", filtered))
        for number, one in enumerate(recovering, 2):
            fields = {"filtered": kept, **question}
            recovered = (*filtered.get("recovered", ()), (one.spec.name, self._asked_another(one, fields)))
            grades.append(self._grades(recovered[-1][1], WRONG * self.tokens, one.spec.name, prompts))
            told = self._graded_filters(joined(grades), recipe.generate.samples, analysed=True)
            filtered |= {"recovered": recovered, "failed": kept, "filters": told}
            last = number == len(recovering) + 1
            kept = self._filter(*("filter", filtered) if last else (f"filter/{number}", {**filtered, "more": True}))
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
            metric=keyed_metric(self.inputs, analysed.metric, "filter"),
            prompts=prompts,
            rows=rows,
            folder=self.inputs.path.parent,
        )
        return self.graph.add("analyse", stage, Work(kind="bytes", amount=len(rows) * 1000.0), disk=len(rows) * 800)

    def _pilot(self, question: dict[str, Any]) -> tuple[Key, Key] | None:
        """Add the answers to a share of the prompts, evenly spaced, and what the filters make of them, where the recipe asks for
        it; return both steps.
        """
        share, every = self.recipe.generate.pilot, self.inputs.prompts
        if share is None:
            return None
        count = max(1, round(share * len(every)))
        rows = tuple(every[at * len(every) // count] for at in range(count))
        tokens = self.tokens * count / len(every)
        few = {"rows": rows, "rows_digest": rows_digest(rows)}
        stage = self._generates(**{**question, **few})
        answers = self._asked("generate/pilot", stage, tokens + self._said(count))
        grades = joined([self._grades(answers, tokens, "pilot")])
        fields = {
            "answers": answers,
            **few,
            "suites": self.inputs.suites,
            "folder": self.inputs.path.parent,
            "reviews": self._reviews(),
            "filters": self._graded_filters(grades, self.recipe.generate.samples, analysed=True),
        }
        return answers, self._filter("filter/pilot", fields)

    def _routed(self) -> tuple[str, ...]:
        """Return the tags of prompts that are sent to teachers of their own."""
        return tuple(sorted({tag for one in self.recipe.teachers for tag in one.tags}))

    def _filter(self, name: str, fields: dict[str, Any]) -> Key:
        style, labels, rows = self.recipe.generate.style, self.recipe.labels, self.inputs.prompts
        stage = ThinkingFilter(**fields, style=style) if style in BLOCKS else Filter(**fields)
        if labels is not None:
            stage = LabelFilter(**fields, labels=labels.names, **labels.rule)
        return self.graph.add(
            name,
            stage,
            Work(kind="bytes", amount=len(rows) * 1000.0),
            disk=len(rows) * 800,
        )

    def _labelled(self, one: Teacher) -> dict[str, Any]:
        """Return what is asked of a teacher in place of a label, as fields of a step; {} where a label is what it answers."""
        labels = self.recipe.labels
        if labels is None or labels.by in ("samples", "majority"):
            return {}
        if labels.by == "logits":  # how answers are written says nothing
            return {"labels": labels.names, "max_new_tokens": 1, "top_p": 1.0}
        (ask, schema), *turned = labels.ways(one, self.recipe.generate.samples)
        return {"ask": ask, "json_schema": schema, "turned": tuple(turned)}

    def _generates(self, **fields: Any) -> Generate:
        """Return the step in which a teacher answers, or, by the labels' "logits", has a probability for each answer."""
        return LabelLikelihoods(**fields) if "labels" in fields else Generate(**fields)

    def _said(self, prompts: int) -> float:
        """Return about how many tokens more it takes to be asked for something else than a label, and to say it."""
        labels = self.recipe.labels
        text = labels.ask if labels is not None else ""
        return prompts * self.recipe.generate.samples * 1.5 * len(text) / CHARACTERS

    def _asked_another(self, one: Other, question: dict[str, Any]) -> Key:
        """Add the answers of a teacher beside the first one; with ``filtered`` in the question, those to what others failed."""
        server, role = one.model.server, one.spec.role
        stage = GenerateRecovery if role == "recovery" else self._generates
        told = {"routed": {"only": one.spec.tags}, "ensemble": {"leave": self._routed()}, "recovery": {}}[role]
        manner = server.manner if server else ""
        own = {
            "teacher": one.key,
            "server": server,
            "manner": manner,
            "scores": one.proof,
            "min_score": one.spec.min_score,
            **self._labelled(one.spec),
        }
        asked = stage(**{**question, **own, **told})
        tokens = (self.tokens + self._said(len(self.inputs.prompts))) * (WRONG if role == "recovery" else 1.0)
        if role == "routed":
            tags, every = set(one.spec.tags), self.inputs.prompts
            tokens *= sum(bool(tags & set(row.tags)) for row in every) / len(every)
        kind = "decode-gguf" if one.spec.backend == "llama_cpp" else "decode"
        params = one.model.facts.params()
        return self.graph.add(
            f"generate/{one.spec.name}",
            asked,
            Work(kind="served", amount=tokens) if server else Work(kind=kind, amount=2 * params * tokens),
            memory=2 * params + RUNTIME_MIB * MIB,
            disk=len(self.inputs.prompts) * asked.samples * 600,
        )

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
