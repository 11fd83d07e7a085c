"""The steps that make prompts: one for each ``[[prompts.augment]]`` table, each from the prompts before it."""

from __future__ import annotations

from typing import Any

from edgedistill.data.augmenters import expected
from edgedistill.data.prompts import rows_digest
from edgedistill.expand_training import TrainingSteps
from edgedistill.fingerprint import Key
from edgedistill.rates import MIB, RUNTIME_MIB, Work, row_tokens
from edgedistill.stages.augment import Augment, Vary

USED = 0.8  # share of the prompts written that is assumed to be used, for estimates
INSTRUCTION = 120  # tokens of what the teacher is told about them


class PromptSteps(TrainingSteps):
    """Adds the augmenters."""

    def _augmented(self, teacher: Key, scores: Key) -> Key | None:
        """Add the augmenters of the recipe; return the last one's key, None where there are none. ``tokens`` counts on with what
        they are expected to add.
        """
        recipe, rows = self.recipe, self.inputs.prompts
        prompts: Key | None = None
        seeds = count = len(rows)
        mean = sum(map(row_tokens, rows)) / max(1, seeds)
        for number, one in enumerate(recipe.prompts.augment, 1):
            settings = one.settings()
            fields: dict[str, Any] = {
                "prompts": prompts,
                "rows_digest": rows_digest(rows),
                "rows": rows,
                "settings": settings,
                "tested": {name: rows_digest(found) for name, found in self.inputs.suites.items()},
                "suites": self.inputs.suites,
            }
            of = min(seeds if one.of == "files" else count, one.rows or count)
            asks, new = expected(settings, of)
            count += int(new * USED) if asks else new
            name, disk = f"augment/{number}-{one.kind}", count * 600
            if not asks:
                prompts = self.graph.add(name, Vary(**fields), Work(kind="bytes", amount=count * 1000.0), disk=disk)
                continue
            stage = Augment(
                **fields,
                teacher=teacher,
                style="answer",
                samples=1,
                temperature=one.temperature,
                top_p=one.top_p,
                max_new_tokens=one.max_new_tokens,
                seed=recipe.seed if one.seed is None else one.seed,
                manner=self.manner,
                batch_size=recipe.generate.batch_size,
                scores=scores,
                min_score=recipe.teacher.min_score,
                server=self.server,
            )
            shown = one.shown if one.kind == "self-instruct" else 1
            tokens = asks * (mean * shown + INSTRUCTION) + new * mean
            prompts = self.graph.add(
                name,
                stage,
                Work(kind="served", amount=tokens)
                if self.server
                else Work(kind="decode-gguf" if self.in_gguf else "decode", amount=2 * self.t_params * tokens),
                memory=2 * self.t_params + RUNTIME_MIB * MIB,
                disk=disk,
            )
        self.tokens = self.tokens * count // max(1, seeds)
        return prompts
