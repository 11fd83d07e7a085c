"""The steps in which a model grades the teacher's answers, for the filters that choose by its grades."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgedistill.asked import asked
from edgedistill.data.prompts import Row, rows_digest
from edgedistill.data.thinking import BLOCKS
from edgedistill.expand_training import TrainingSteps
from edgedistill.fingerprint import Key
from edgedistill.pooling import pooling_of
from edgedistill.rates import MIB, RUNTIME_MIB, Work
from edgedistill.recipe_filter import Filter
from edgedistill.stages.base import Gguf, Served
from edgedistill.stages.embed import Embed
from edgedistill.stages.generate import Judge
from edgedistill.stages.grade import Grade

LONGER = 1.5  # times the tokens of prompt and answer that a judge reads: the rubric, too
VERDICT = 60  # tokens that a judge is assumed to write


def joined(grades: Sequence[Mapping[int, Key]]) -> dict[int, Key | tuple[Key, ...]]:
    """Return the steps that grade for each filter: one, or one for the answers of each teacher."""
    if len(grades) == 1:
        return dict(grades[0])
    return {at: tuple(one[at] for one in grades) for at in grades[0]}


def _several_references(rows: Iterable[Row]) -> bool:
    """Tell whether some rows ask the same and differ in their references."""
    first: dict[object, str | None] = {}
    return any(first.setdefault(asked(row), row.reference) != row.reference for row in rows)


class GradeSteps(TrainingSteps):
    """Adds a step for each filter by a model, and the models that it needs."""

    def _grades(self, answers: Key, tokens: float, tag: str = "", prompts: Key | None = None) -> dict[int, Key]:
        """Add the grading of some answers, of so many tokens with their prompts; return the steps' keys by the filter's number."""
        found: dict[int, Key] = {}
        for at, one in enumerate(self.recipe.filter):
            if not one.asks_model:
                continue
            number = sum(other.kind == one.kind for other in self.recipe.filter[: at + 1])
            verb = "embed" if one.kind == "duplicates" else "grade"
            name = f"{verb}/{one.kind}{f'-{number}' if number > 1 else ''}{f'/{tag}' if tag else ''}"
            add = {"judge": self._judged, "duplicates": self._embedded}.get(one.kind, self._graded)
            found[at] = add(name, one, answers, tokens, prompts)
        return found

    def _graded(self, name: str, one: Filter, answers: Key, tokens: float, prompts: Key | None) -> Key:
        model, params = self._grader(one)
        rows = self.inputs.prompts
        stage = Grade(
            kind="perplexity" if one.kind == "perplexity" else "reward",
            model=model,
            answers=answers,
            rows_digest=rows_digest(rows),
            prompts=prompts,
            rows=rows,
            label=one.label,
            shown=one.kind == "reward" and self.recipe.generate.style in BLOCKS,
        )
        return self.graph.add(
            name,
            stage,
            Work(kind="forward", amount=2 * params * tokens),
            memory=4 * params + RUNTIME_MIB * MIB,
            disk=len(rows) * self.recipe.generate.samples * 100,
        )

    def _embedded(self, name: str, one: Filter, answers: Key, tokens: float, prompts: Key | None) -> Key:
        """Add the vectors of the answers, for a filter of duplicates."""
        rows, source = self.inputs.prompts, self.inputs.graders[one.model or ""]
        params = source.facts.params()
        stage = Embed(
            model=self._base("base/encoder", source),
            answers=answers,
            rows_digest=rows_digest(rows),
            pooling=pooling_of(source.path, one.pooling),
            shown=self.recipe.generate.style in BLOCKS,
            prompts=prompts,
            rows=rows,
        )
        return self.graph.add(
            name,
            stage,
            Work(kind="forward", amount=2 * params * tokens),
            memory=4 * params + RUNTIME_MIB * MIB,
            disk=len(rows) * self.recipe.generate.samples * (4 * source.facts.hidden + 70),
        )

    def _grader(self, one: Filter) -> tuple[Key, int]:
        """Return the step that has the model of a filter, and its parameters."""
        source = one.model or "student"
        if source == "teacher":
            assert self.asked is not None
            return self.asked, self.t_params
        if source == "student":
            assert self.whole_student is not None
            return self.whole_student, self.inputs.student.facts.params()
        model = self.inputs.graders[source]
        return self._base(f"base/{one.kind}", model), model.facts.params()

    def _judged(self, name: str, one: Filter, answers: Key, tokens: float, prompts: Key | None) -> Key:
        """Add the questions to the judge: the recipe's, or the teacher."""
        rows, fields = self.inputs.prompts, self._judge()
        server, params = fields["server"], fields.pop("params")
        stage = Judge(
            **fields,
            rows_digest=rows_digest(rows),
            prompts=prompts,
            rows=rows,
            style="answer",
            samples=1,
            temperature=0.0,
            top_p=1.0,
            max_new_tokens=one.max_new_tokens,
            seed=self.recipe.seed,
            batch_size=self.recipe.generate.batch_size,
            scores=None,
            min_score={},
            answers=answers,
            rubric=one.rubric or "",
            against=one.against or "",
            apart=bool(one.against) and _several_references(rows),
        )
        count = len(rows) * self.recipe.generate.samples * (2 if one.against else 1)
        amount = LONGER * tokens * (2 if one.against else 1) + VERDICT * count
        by_llama_cpp = self.in_gguf if self.recipe.judge is None else self.recipe.judge.backend == "llama_cpp"
        decode = "decode-gguf" if by_llama_cpp else "decode"
        return self.graph.add(
            name,
            stage,
            Work(kind="served", amount=amount) if server else Work(kind=decode, amount=2 * params * amount),
            memory=2 * params + RUNTIME_MIB * MIB,
            disk=count * 600,
        )

    def _judge(self) -> dict[str, Any]:
        """Return who judges, as the fields of a step, with its parameters."""
        table, model = self.recipe.judge, self.inputs.judge
        if table is None or model is None:
            assert self.asked is not None
            return {"teacher": self.asked, "server": self.server, "manner": self.manner, "params": self.t_params}
        server = model.server
        if table.backend == "llama_cpp":
            key = self.graph.add(
                "base/judge",
                Gguf(source_digest=model.digest, path=model.path),
                Work(kind="bytes", amount=model.facts.size),
            )
        elif server is not None and server.launch is None:
            key = self.graph.add("base/judge", Served(identity=server.identity), Work(kind="bytes", amount=1000.0))
        else:
            key = self._base("base/judge", model)
        manner = server.manner if server else ""
        return {"teacher": key, "server": server, "manner": manner, "params": model.facts.params()}

    def _graded_filters(
        self, grades: Mapping[int, Key | tuple[Key, ...]], samples: int, *, analysed: bool = False
    ) -> tuple[dict[str, Any], ...]:
        """Return the filters as a step's key holds them: of those by a model, the step with its grades and what passes."""
        found = []
        for at, (one, fields) in enumerate(
            zip(self.recipe.filter, self._filters(samples, analysed=analysed), strict=True)
        ):
            if at not in grades:
                found.append(fields)
                continue
            kept = {
                name: fields[name] for name in ("kind", "metric", "otherwise", "hedge", "against") if name in fields
            }
            found.append({**kept, **one.passing, ("vectors" if one.kind == "duplicates" else "grades"): grades[at]})
        return tuple(found)
