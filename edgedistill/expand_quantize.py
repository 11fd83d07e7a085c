"""The steps that make files of a target's types: calibration, the choice of types, quantizing, tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgedistill.compare import step_of
from edgedistill.cpus import usable_cpus
from edgedistill.data.prompts import rows_digest
from edgedistill.devices.host import fingerprint
from edgedistill.evals.kv_cache import rows_for
from edgedistill.expand_training import TrainingSteps
from edgedistill.fingerprint import Key
from edgedistill.inputs import student_facts
from edgedistill.kv_cache import CHOICES, F16, Pair, cache_bytes
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.plan import Graph, package_version
from edgedistill.rates import (
    MIB,
    RUNTIME_MIB,
    Work,
    calibrate_memory,
    convert_memory,
    quantize_memory,
    row_tokens,
    sensitivity_work,
    train_work,
)
from edgedistill.refusals_auto import speeds_of
from edgedistill.stages.allocate import Allocate
from edgedistill.stages.calibrate import Calibrate
from edgedistill.stages.converse import Converse
from edgedistill.stages.convert import Convert
from edgedistill.stages.kv_cache import KvCache
from edgedistill.stages.quantize import Quantize
from edgedistill.stages.sensitivity import Sensitivity
from edgedistill.stages.sensitivity_onnx import SensitivityOnnx
from edgedistill.stages.tune import Tune
from edgedistill.target import AUTO, Target, Types


def add_sensitivity(graph: Graph, name: str, stage: Sensitivity | SensitivityOnnx, params: int) -> Key:
    """Add the table of a model of ``params`` weights."""
    return graph.add(name, stage, sensitivity_work(params), memory=10 * params + 2500 * MIB, disk=MIB)


def onnx_options(types: Types) -> dict[str, Any]:
    """Return what the step ``quantize`` takes of types beside those of GGUF."""
    return {"block": types.block, "symmetric": types.symmetric, "accuracy": types.accuracy}


def is_wide(types: Types) -> bool:
    """Tell whether a file of these types holds more of a weight than f16 does, in bits or in range."""
    return not {"F32", "BF16"}.isdisjoint((types.type, types.embedding_type, types.output_type))


def add_choice(
    graph: Graph, name: str, model: Key, sensitivity: Key, size: int, speeds: Mapping[str, Any] | None
) -> Key:
    """Add the choice of types for a file of ``size`` bytes."""
    solver = f"scipy {package_version('scipy')}"
    stage = Allocate(model=model, sensitivity=sensitivity, size=size, tool=solver, speeds=speeds)
    return graph.add(name, stage, Work(kind="bytes", amount=3e8), memory=300 * MIB, disk=MIB)


def add_kv_cache(graph: Graph, name: str, target: Target, model: Key, text: Key, facts: ModelFacts) -> Key:
    """Add the choice of types for a target's KV cache, or the proof of those that it names; ``text`` has tokens to fill it with."""
    kv, context = target.kv, target.runtime.context
    stage = KvCache(
        model=model,
        text=text,
        context=context,
        types=CHOICES if kv == AUTO else (kv,),
        peak_rss=target.limits.peak_rss if kv == AUTO else None,
        threads=min(target.runtime.threads, usable_cpus()),
        build=f"llama-cpp-python {package_version('llama-cpp-python')}",
        isa=fingerprint().isa,
    )
    length = min(context, facts.context) or context
    tokens = 3 * length * rows_for(length)  # f16, the types, and f16 without flash attention
    work = Work(kind="forward-gguf", amount=2 * facts.params() * tokens)
    memory = 2 * facts.params() + 3 * cache_bytes(facts, length, F16) + 500 * MIB
    return graph.add(name, stage, work, memory=memory, disk=MIB)


def add_general(graph: Graph, name: str, model: Key, count: int, params: int, tool: str) -> Key | None:
    """Add the conversations that a model writes for its own calibration; none of 0."""
    if not count:
        return None
    # Decoded many at once, and the prompts are short: as long as reading a few hundred tokens each.
    work = Work(kind="forward-gguf", amount=2 * params * count * 300)
    stage = Converse(model=model, count=count, tool=tool)
    return graph.add(name, stage, work, memory=3 * params + 700 * MIB, disk=MIB)


class QuantizeSteps(TrainingSteps):
    """Adds them for one student at a time."""

    def _convert(self, name: str, model: Key, of: Resolved, params: int, *, title: str = "") -> Key:
        stage = Convert(
            model=model,
            dtype="f16",
            tool=self.gguf_tool,
            title=f"{self.recipe.name} {title or name.removeprefix('convert/')}",
            licence=of.facts.licence or "",
            rows=self.checks,
        )
        return self.graph.add(
            name,
            stage,
            Work(kind="convert", amount=2 * params),
            memory=convert_memory(params),
            disk=2 * params + 4 * MIB,
        )

    def _widened(self, gguf: Key, types: Types, params: int) -> Key:
        """Return the file that one of these types is made from: where one is wider than f16, the checkpoint in float32."""
        step = self.graph.step(gguf)
        if not is_wide(types) or not isinstance(step.stage, Convert):  # a teacher's file is what it is
            return gguf
        name, at, of = step.id.partition("@")
        return self.graph.add(
            f"{name}-f32{at}{of}",
            replace(step.stage, dtype="f32"),
            Work(kind="convert", amount=4 * params),
            memory=convert_memory(params, wide=True),
            disk=4 * params + 4 * MIB,
        )

    def _typed(
        self, name: str, target: Target, student: Key, gguf: Key, imatrix: Key, kept: Key, of: str = ""
    ) -> tuple[Key, str]:
        """Add the student in a target's type, tuned where the recipe asks for it; return the key and the file in it.
        ``of`` names the student where it is not the last one.
        """
        onnx = target.runtime.format == "onnx"
        choice = None
        if target.quantize.type == AUTO:
            step = "sensitivity-onnx" if onnx else "sensitivity"
            step = step_of(step, of) if of else step
            if onnx:
                sensitivity = self._sensitivity_onnx(step, student, kept)
            else:
                sensitivity = self._sensitivity(step, gguf, student, kept)
            choice = self._allocate(f"allocate/{name}", student if onnx else gguf, sensitivity, target), sensitivity
        key = self._quantize(
            f"quantize/{name}",
            student if onnx else gguf,
            imatrix if target.quantize.imatrix and not onnx else None,
            target.runtime.format,
            target.quantize,
            self.s_params,
            choice,
            kept,
        )
        if self.recipe.tune and target.name in self.recipe.tune.targets:
            key = self._tune(f"tune/{name}", key, student)
        return key, "onnx" if onnx else "model.gguf"

    def _kv_cache(self, name: str, target: Target, model: Key, text: Key) -> tuple[Pair | Key, Key | None]:
        """Return the types of a target's KV cache, or what chooses them; and the step that tells their cost: none of f16."""
        kv = target.kv
        if kv == F16:
            return F16, None
        key = add_kv_cache(self.graph, f"kv-cache/{name}", target, model, text, student_facts(self.inputs))
        return key if kv == AUTO else kv, key

    def _general(self, name: str, gguf: Key, params: int) -> Key | None:
        return add_general(self.graph, name, gguf, self.recipe.calibrate.general, params, self.llama)

    def _calibrate(self, name: str, gguf: Key, kept: Key, params: int) -> Key:
        rows = min(self.recipe.calibrate.rows, len(self.inputs.prompts))
        share = rows / max(1, len(self.inputs.prompts))
        general = self._general(name.replace("calibrate", "converse"), gguf, params)
        return self.graph.add(
            name,
            Calibrate(model=gguf, kept=kept, rows=self.recipe.calibrate.rows, tool=self.llama, general=general),
            Work(kind="forward", amount=2 * params * self.tokens * share),
            memory=calibrate_memory(params),
            disk=4 * MIB,
        )

    def _sensitivity(self, name: str, gguf: Key, student: Key, kept: Key) -> Key:
        """Add the table that every target with types of its own chooses from."""
        rows, params = self.recipe.calibrate.rows, self.s_params
        general = self._general(name.replace("sensitivity", "converse"), gguf, params)
        stage = Sensitivity(
            model=gguf, checkpoint=student, kept=kept, text=(), rows=rows, tool=self.llama, general=general
        )
        return add_sensitivity(self.graph, name, stage, params)

    def _sensitivity_onnx(self, name: str, student: Key, kept: Key) -> Key:
        """Add the table that every ONNX target with kinds of its own chooses from."""
        rows, params = self.recipe.calibrate.rows, self.s_params
        stage = SensitivityOnnx(checkpoint=student, kept=kept, text=(), rows=rows, tool=self.onnx)
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
        kept: Key | None = None,
    ) -> Key:
        onnx, gptq = format_ == "onnx", types.rounding == "gptq"
        stage = Quantize(
            model=model if onnx else self._widened(model, types, params),
            calibration=calibration,
            format=format_,
            type=types.type,
            embedding_type=types.embedding_type,
            output_type=types.output_type,
            rounding=types.rounding,
            tool=self.onnx if onnx else self.llama,
            types=choice[0] if choice else None,
            sensitivity=choice[1] if choice else None,
            kept=kept if onnx and gptq else None,
            calibrated=self.recipe.calibrate.rows if onnx and gptq else 0,
            rows=self.checks,
            **onnx_options(types),
        )
        kind, size = ("build-onnx", 4 * params) if onnx else ("quantize", 2 * params)
        memory = quantize_memory(params, onnx=onnx, gptq=gptq, chosen=choice is not None)
        if onnx and (gptq or choice):
            kind = "round-onnx"
        elif gptq:
            kind = "quantize-gptq"
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
