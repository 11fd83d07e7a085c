"""evaluate: how well one artifact does the task, and how far its distribution moved.

In: an artifact (HF folder, GGUF or ONNX), the suites. Out: ``answers/<suite>.jsonl``, ``scores.json``. A suite with a
grammar is answered twice, free and under it. KLD and top-1 agreement are taken over the reference tokens against the
merged student and the teacher where they are given. What was answered before a kill is not answered again. Keyed by
the runner's build and this machine's instruction set, not by the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgedistill.chat import Chat
from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.kv_cache import F16, Pair, types_of
from edgedistill.served import Server
from edgedistill.step import Context, Stage, later, unkeyed

if TYPE_CHECKING:
    from edgedistill.evals.runners.base import Runner

LIKELIHOOD_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class SuiteSpec:
    """One suite as evaluate keys it: the digest of its rows, not their path."""

    name: str
    digest: str
    metric: str
    max_new_tokens: int
    grammar: str | None = None  # the GBNF text


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Answer the suites with one artifact. ``shots`` are training examples put before every prompt."""

    name: ClassVar[str] = "evaluate"
    model: Key
    file: str  # "model", "model.gguf", "onnx" or "served.json" inside the entry
    suites: tuple[SuiteSpec, ...]
    shots: tuple[Mapping[str, Any], ...]
    references: Mapping[str, Key]  # "student" and "teacher": entries with a model.gguf
    build: str
    isa: str
    labels: tuple[str, ...] = later(())  # of suites whose metric is "label"
    kv: Pair | Key = later(F16)  # types of the KV cache, or the step that chose them
    template: str = later("")  # digest of that which makes text of a server's calls
    rows: Mapping[str, tuple[Row, ...]] = unkeyed()
    server: Server | None = unkeyed(default=None)  # that of a teacher whose weights are not here
    folder: Path = unkeyed(default=Path())  # the recipe's, where the files of metrics lie
    chat: Chat | None = unkeyed(default=None)  # what ``template`` is the digest of

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Answer, score, compare distributions."""
        from edgedistill.evals.metrics import LABEL, find_metric
        from edgedistill.evals.suites import evaluate

        facts: dict[str, Any] = {"suites": {}, "likelihood": {}}
        (ctx.out / "answers").mkdir()
        runner = self._open(ctx)
        try:
            for suite in self.suites:
                rows = self.rows[suite.name]
                if suite.metric == "perplexity":
                    facts["suites"][suite.name] = {"perplexity": self._perplexity(runner, rows, ctx)}
                    continue
                for grammar in (None, suite.grammar) if suite.grammar else (None,):
                    label = suite.name + (" (grammar)" if grammar else "")
                    stem = suite.name + (".grammar" if grammar else "")
                    result = evaluate(
                        runner,
                        with_shots(rows, self.shots),
                        find_metric(suite.metric, self.folder),
                        max_new_tokens=suite.max_new_tokens,
                        grammar=grammar,
                        labels=self.labels if suite.metric == LABEL and not grammar else (),
                        sure=self.server is None,
                        kept=ctx.work / stem,
                        progress=lambda done, total, note, label=label: ctx.progress(done, total, label),
                    )
                    result.save_answers(ctx.out / "answers" / f"{stem}.jsonl")
                    if grammar:
                        facts["suites"][suite.name]["grammar"] = result.summary()
                    else:
                        facts["suites"][suite.name] = result.summary()
            facts["likelihood"] = self._likelihood(runner, ctx)
        finally:
            runner.close()
        (ctx.out / "scores.json").write_text(json.dumps(_timeless(facts), indent=1, sort_keys=True))
        return facts

    def _open(self, ctx: Context) -> Runner:
        from edgedistill.evals.runners import open_runner
        from edgedistill.evals.runners.served import ServedRunner

        if self.server is not None:
            weights = ctx.path(self.model, "model")
            teacher = ctx.entries[self.model].digest
            return ServedRunner(self.server, ctx.rows, teacher=teacher, weights=weights, chat=self.chat, note=ctx.note)
        return open_runner(ctx.path(self.model, self.file), threads=ctx.threads, kv=types_of(ctx, self.kv))

    def _perplexity(self, runner: Any, rows: tuple[Row, ...], ctx: Context) -> dict[str, Any]:
        from edgedistill.evals.likelihood import perplexity

        return perplexity(
            runner, list(rows), progress=lambda done, total, note: ctx.progress(done, total, "perplexity")
        ).to_json()

    def _likelihood(self, runner: Any, ctx: Context) -> dict[str, Any]:
        """Compare distributions on the reference tokens of the first scored suite."""
        from edgedistill.evals.likelihood import compare_distributions

        scored = [suite for suite in self.suites if suite.metric != "perplexity"]
        if not scored or not self.references:
            return {}
        rows = [row for row in self.rows[scored[0].name] if row.reference][:LIKELIHOOD_ROWS]
        names = " and ".join(f"the {name}" for name in self.references)
        found = compare_distributions(
            runner,
            {name: Path(ctx.path(key, "model.gguf")) for name, key in self.references.items()},
            rows,
            store=ctx.store,
            unlike=("teacher",),  # it may teach text, or aligned logits
            threads=ctx.threads,
            progress=lambda done, total, note: ctx.progress(done, total, f"KLD against {names}"),
        )
        for name in self.references.keys() - found.keys():
            ctx.note(f"no KLD against the {name}: it cuts text into other tokens")
        return {name: report.to_json() for name, report in found.items()}


def _timeless(facts: Any) -> Any:
    """Leave out how long it took, and figures that came later and are for the report alone: an evaluation done again has the
    same bytes, and nothing after it runs.
    """
    if isinstance(facts, Mapping):
        return {key: _timeless(value) for key, value in facts.items() if key not in ("seconds", "calibration")}
    return facts


def with_shots(rows: tuple[Row, ...], shots: tuple[Mapping[str, Any], ...]) -> list[Row]:
    """Put solved examples before each prompt as earlier turns of the chat."""
    if not shots:
        return list(rows)
    import dataclasses

    found = []
    for row in rows:
        system = [m for m in row.messages if m["role"] == "system"]
        turns = [
            turn
            for shot in shots
            for turn in (
                {"role": "user", "content": shot["prompt"]},
                {"role": "assistant", "content": shot["reference"]},
            )
        ]
        rest = [m for m in row.messages if m["role"] != "system"]
        found.append(dataclasses.replace(row, messages=(*system, *turns, *rest)))
    return found
