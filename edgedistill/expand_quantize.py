"""The steps that make files of a target's types: calibration, the choice of types, quantizing, tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgedistill.compare import step_of
from edgedistill.data.prompts import rows_digest
from edgedistill.expand_training import TrainingSteps
from edgedistill.fingerprint import Key
from edgedistill.plan import Graph, package_version
from edgedistill.rates import MIB, RUNTIME_MIB, Work, row_tokens, sensitivity_work, train_work
from edgedistill.refusals_auto import speeds_of
from edgedistill.stages.allocate import Allocate
from edgedistill.stages.calibrate import Calibrate
from edgedistill.stages.quantize import Quantize
from edgedistill.stages.sensitivity import Sensitivity
from edgedistill.stages.tune import Tune
from edgedistill.target import AUTO, Target, Types


def add_sensitivity(graph: Graph, name: str, stage: Sensitivity, params: int) -> Key:
    """Add the table of a model of ``params`` weights."""
    return graph.add(name, stage, sensitivity_work(params), memory=10 * params + 2500 * MIB, disk=MIB)


def add_choice(
    graph: Graph, name: str, model: Key, sensitivity: Key, size: int, speeds: Mapping[str, Any] | None
) -> Key:
    """Add the choice of types for a file of ``size`` bytes."""
    solver = f"scipy {package_version('scipy')}"
    stage = Allocate(model=model, sensitivity=sensitivity, size=size, tool=solver, speeds=speeds)
    return graph.add(name, stage, Work(kind="bytes", amount=3e8), memory=300 * MIB, disk=MIB)


class QuantizeSteps(TrainingSteps):
    """Adds them for one student at a time."""

    def _typed(
        self, name: str, target: Target, student: Key, gguf: Key, imatrix: Key, kept: Key, of: str = ""
    ) -> tuple[Key, str]:
        """Add the student in a target's type, tuned where the recipe asks for it; return the key and the file in it.
        ``of`` names the student where it is not the last one.
        """
        onnx = target.runtime.format == "onnx"
        choice = None
        if target.quantize.type == AUTO:
            sensitivity = self._sensitivity(step_of("sensitivity", of) if of else "sensitivity", gguf, student, kept)
            choice = self._allocate(f"allocate/{name}", gguf, sensitivity, target), sensitivity
        key = self._quantize(
            f"quantize/{name}",
            student if onnx else gguf,
            imatrix if target.quantize.imatrix and not onnx else None,
            target.runtime.format,
            target.quantize,
            self.s_params,
            choice,
        )
        if self.recipe.tune and target.name in self.recipe.tune.targets:
            key = self._tune(f"tune/{name}", key, student)
        return key, "onnx" if onnx else "model.gguf"

    def _calibrate(self, name: str, gguf: Key, kept: Key, params: int) -> Key:
        rows = min(self.recipe.calibrate.rows, len(self.inputs.prompts))
        share = rows / max(1, len(self.inputs.prompts))
        return self.graph.add(
            name,
            Calibrate(model=gguf, kept=kept, rows=self.recipe.calibrate.rows, tool=self.llama),
            Work(kind="forward", amount=2 * params * self.tokens * share),
            memory=3 * params + 300 * MIB,
            disk=4 * MIB,
        )

    def _sensitivity(self, name: str, gguf: Key, student: Key, kept: Key) -> Key:
        """Add the table that every target with types of its own chooses from."""
        rows, params = self.recipe.calibrate.rows, self.s_params
        stage = Sensitivity(model=gguf, checkpoint=student, kept=kept, text=(), rows=rows, tool=self.llama)
        return add_sensitivity(self.graph, name, stage, params)

    def _allocate(self, name: str, gguf: Key, sensitivity: Key, target: Target) -> Key:
        size = target.auto_size
        assert size is not None  # the target's check
        return add_choice(self.graph, name, gguf, sensitivity, size, speeds_of(target))

    def _quantize(
        self,
        name: str,
        model: Key,
        calibration: Key | None,
        format_: str,
        types: Types,
        params: int,
        choice: tuple[Key, Key] | None = None,
    ) -> Key:
        stage = Quantize(
            model=model,
            calibration=calibration,
            format=format_,
            type=types.type,
            embedding_type=types.embedding_type,
            output_type=types.output_type,
            rounding=types.rounding,
            tool=self.onnx if format_ == "onnx" else self.llama,
            types=choice[0] if choice else None,
            sensitivity=choice[1] if choice else None,
            rows=self.checks,
        )
        kind, size = ("build-onnx", 4 * params) if format_ == "onnx" else ("quantize", 2 * params)
        memory = 6 * params + 300 * MIB
        if types.rounding == "gptq":  # second moments of a gibibyte at most, the inputs of a batch, and torch
            kind, memory = "quantize-gptq", memory + (1500 + RUNTIME_MIB) * MIB
        return self.graph.add(name, stage, Work(kind=kind, amount=size), memory=memory, disk=size)

    def _tune(self, name: str, quantized: Key, student: Key) -> Key:
        tune, rows, general = self.recipe.tune, self.inputs.tuning, self.inputs.tuning_general
        assert tune is not None
        weights = tune.parts == "weights"
        training = tune.keyed("targets", "files", "rows", "skip", "general")
        if tune.general is not None:
            training["general"] = {**tune.general.keyed("files", "rows"), "rows_digest": rows_digest(general)}
        stage = Tune(
            quantized=quantized,
            student=student,
            rows_digest=rows_digest(rows),
            rows=rows,
            general=general,
            training=training,
            seed=self.recipe.seed,
        )
        tokens = sum(map(row_tokens, (*rows, *general))) * tune.epochs
        work = train_work(self.s_params, tokens, full=weights)
        return self.graph.add(
            name,
            stage,
            replace(work, amount=work.amount + 2 * self.s_params * tokens),
            # Weights: bf16 ones of both models and their gradients, float32 places, gradients and two moments, blocks.
            memory=(24 if weights else 12) * self.s_params + (RUNTIME_MIB + 600) * MIB,
            disk=(30 if weights else 5) * self.s_params,
        )
