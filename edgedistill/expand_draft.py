"""The steps of a draft model: text that the shipped file writes, the draft cut out of the student, trained on it, and measured."""

from __future__ import annotations

from edgedistill.data.prompts import rows_digest
from edgedistill.expand_training import TrainingSteps
from edgedistill.fingerprint import Key
from edgedistill.inputs import draft_inputs, student_facts
from edgedistill.kv_cache import Pair
from edgedistill.rates import DEFAULTS, MIB, RUNTIME_MIB, Work, row_tokens
from edgedistill.stages.distill import DistillDraft
from edgedistill.stages.speculate import Speculate
from edgedistill.stages.write import Write
from edgedistill.target import Target

PROMPTS = 64
"""Prompts of the first suite with answers that a draft is measured on: evenly spaced ones, each once with it and once without."""


class DraftSteps(TrainingSteps):
    """Adds them for one target at a time."""

    def _train_draft(self, target: Target, shipped: Key, student: Key) -> tuple[Key, int]:
        """Return the trained draft, and its parameters. ``shipped`` is the file that it is for."""
        whole = self.inputs, self.recipe, self.t_params, self.s_params, self.tokens
        rows = self.inputs.drafting or self.inputs.prompts
        tokens = sum(map(row_tokens, rows))
        text = self.graph.add(
            f"write/{target.name}",
            Write(
                model=shipped,
                rows_digest=rows_digest(rows),
                max_new_tokens=self.recipe.generate.max_new_tokens,
                build=self.llama,
                isa=self.isa,
                rows=rows,
            ),
            Work(kind="decode-gguf", amount=2 * self.s_params * tokens),
            memory=4 * self.s_params + RUNTIME_MIB * MIB,
            disk=len(rows) * 800,
        )
        self.inputs = draft_inputs(self.inputs)
        self.recipe, self.tokens = self.inputs.recipe, tokens
        self.t_params, self.s_params = self.s_params, student_facts(self.inputs).params()
        shaped = self._shape("shape/draft", student)
        draft = self._distill(
            f"distill/draft-{target.name}", "", shaped, text, None, teacher=student, beside=DistillDraft
        )
        params = self.s_params
        self.inputs, self.recipe, self.t_params, self.s_params, self.tokens = whole
        return draft, params

    def _speculate(self, target: Target, shipped: Key, draft: Key, kv: Pair | Key) -> Key:
        """Measure the quantized draft beside the file that it is for."""
        settings = self.recipe.draft
        assert settings is not None
        name, suite = next((n, s) for n, s in self.recipe.suites.items() if s.metric != "perplexity")
        rows = self.inputs.suites[name]
        count = min(PROMPTS, len(rows))
        prompts = tuple(rows[at * len(rows) // count] for at in range(count))
        stage = Speculate(
            model=shipped,
            draft=draft,
            tokens=settings.tokens,
            min_probability=settings.min_probability,
            max_new_tokens=suite.max_new_tokens,
            threads=min(target.runtime.threads, self.host.cores),
            context=target.runtime.context,
            device=self.host.digest,
            build=self.llama,
            prompts_digest=rows_digest(prompts),
            kv=kv,
            prompts=prompts,
        )
        # As `measure`, counted in nominal seconds: reading and writing that many tokens twice, and loading.
        seconds = 2 + 4 * self.s_params * sum(map(row_tokens, prompts)) / DEFAULTS["decode-gguf"]
        work = Work(kind="measure", amount=seconds * DEFAULTS["measure"])
        return self.graph.add(f"speculate/{target.name}", stage, work, memory=600 * MIB)
