"""Recipe x targets -> the graph of steps, each with an estimate; and everything that can be refused before anything runs.

``plan`` imports no torch and runs nothing. Chains, baselines and several targets are more steps, not special cases; two steps with
one key are one step with two names.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Row, leaks, load_rows, rows_digest
from edgedistill.devices.host import fingerprint as host_fingerprint
from edgedistill.errors import RecipeError, UsageError
from edgedistill.fingerprint import Key, digest
from edgedistill.models import Resolved
from edgedistill.rates import Work
from edgedistill.recipe import Recipe, Suite
from edgedistill.stages.adapt import Adapt
from edgedistill.stages.base import Base
from edgedistill.stages.calibrate import Calibrate
from edgedistill.stages.convert import Convert
from edgedistill.stages.distill import Distill
from edgedistill.stages.evaluate import Evaluate, SuiteSpec
from edgedistill.stages.filter import Filter
from edgedistill.stages.generate import Generate
from edgedistill.stages.heal import Heal
from edgedistill.stages.measure import Measure
from edgedistill.stages.merge import Merge
from edgedistill.stages.package import Package
from edgedistill.stages.quantize import Quantize
from edgedistill.stages.score import Score
from edgedistill.stages.shape import Shape
from edgedistill.step import Stage
from edgedistill.target import Target, format_size, matches_host

MIB = 2**20
RUNTIME_MIB = 700  # torch, transformers and Python themselves
MEASURE_SECONDS = 1e9  # work units of "measure" are nominal seconds x 1e9, scaled by the model's bytes


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage bound to its inputs. ``ids`` are the names it goes by; ``memory`` and ``disk`` are estimates in bytes."""

    ids: tuple[str, ...]
    stage: Stage
    key: Key
    work: Work
    memory: int
    disk: int

    @property
    def id(self) -> str:
        """The first of its names."""
        return self.ids[0]


@dataclass
class Plan:
    """The steps in an order in which each follows its inputs."""

    identity: str
    steps: list[Step]
    warnings: list[str] = field(default_factory=list)
    packages: dict[str, Key] = field(default_factory=dict)

    @property
    def by_key(self) -> dict[Key, Step]:
        """Steps by key."""
        return {step.key: step for step in self.steps}

    def match(self, pattern: str) -> list[Step]:
        """Return the steps that a name, a stage or a glob means; raises UsageError with what there is."""
        found = [
            step
            for step in self.steps
            if step.stage.name == pattern or any(fnmatch.fnmatchcase(name, pattern) for name in step.ids)
        ]
        if not found:
            names = ", ".join(name for step in self.steps for name in step.ids)
            raise UsageError(f"no step {pattern!r} in this plan", f"steps: {names}")
        return found

    def only(self, wanted: Iterable[Step]) -> Plan:
        """Return the plan cut down to some steps and what they need."""
        by_key, keep = self.by_key, set()
        todo = [step.key for step in wanted]
        while todo:
            key = todo.pop()
            if key not in keep:
                keep.add(key)
                todo += by_key[key].stage.inputs()
        return Plan(
            identity=self.identity,
            steps=[step for step in self.steps if step.key in keep],
            warnings=self.warnings,
            packages={name: key for name, key in self.packages.items() if key in keep},
        )


class Graph:
    """Collect steps; a second step with the same key becomes another name of the first."""

    def __init__(self) -> None:
        self._steps: dict[Key, Step] = {}

    def add(self, name: str, stage: Stage, work: Work, *, memory: float = 0, disk: float = 0) -> Key:
        """Add one step and return its key."""
        key = stage.key()
        known = self._steps.get(key)
        ids = (*known.ids, name) if known else (name,)
        self._steps[key] = Step(
            ids=tuple(dict.fromkeys(ids)), stage=stage, key=key, work=work, memory=int(memory), disk=int(disk)
        )
        return key

    def steps(self) -> list[Step]:
        """Return the steps in the order in which they were added."""
        return list(self._steps.values())


def package_version(name: str) -> str:
    """Return the installed version of a package, or "" if it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ── what the recipe names, read and checked ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a plan is made of, read from disk."""

    recipe: Recipe
    path: Path
    teacher: Resolved
    student: Resolved
    targets: tuple[Target, ...]
    prompts: tuple[Row, ...]
    gold: tuple[Row, ...]
    suites: Mapping[str, tuple[Row, ...]]
    ship_anyway: bool = False


def read_rows(recipe_path: Path, files: Iterable[Path], limit: int | None, key: str, *, reference: bool) -> tuple[Row, ...]:
    """Read the rows of several JSONL files relative to the recipe; the key is named in errors."""
    rows: list[Row] = []
    for file in files:
        path = recipe_path.parent / file
        if not path.is_file():
            raise RecipeError(f"{path}: no such file", f"create it, or mend {key}", file=recipe_path, key=key)
        rows += load_rows(path, need_reference=reference)
    doubled = [name for name, group in itertools.groupby(sorted(row.id for row in rows)) if len(list(group)) > 1]
    if doubled:
        raise RecipeError(f"two rows have the id {doubled[0]!r}", "make ids unique", file=recipe_path, key=key)
    return tuple(rows[:limit])


def read_inputs(
    recipe: Recipe, path: Path, teacher: Resolved, student: Resolved, targets: Iterable[Target], *, ship_anyway: bool = False
) -> Inputs:
    """Read the data files of a recipe."""
    need = any(f.kind == "reference" for f in recipe.filter) or recipe.baselines.gold_sft
    return Inputs(
        recipe=recipe,
        path=path,
        teacher=teacher,
        student=student,
        targets=tuple(targets),
        prompts=read_rows(path, recipe.prompts.files, recipe.prompts.rows, "prompts.files", reference=need),
        gold=read_rows(path, recipe.adapt.files, recipe.adapt.rows, "adapt.files", reference=True) if recipe.adapt else (),
        suites={
            name: read_rows(path, suite.files, None, f"suites.{name}.files", reference=True)
            for name, suite in recipe.suites.items()
        },
        ship_anyway=ship_anyway,
    )


def refuse(inputs: Inputs) -> list[str]:
    """Raise RecipeError or UsageError for what cannot work; return warnings for what works but deserves a word."""
    from edgedistill.training.lora import check_targets

    recipe, warnings = inputs.recipe, []
    teacher, student = inputs.teacher.facts, inputs.student.facts
    where = {"file": inputs.path}
    if recipe.score.kind != "none" and recipe.distill.loss.kd > 0 and teacher.tokenizer != student.tokenizer:
        raise RecipeError(
            f"{recipe.teacher.model} and {recipe.student.model} have different tokenizers: their distributions cannot be compared",
            'set score.kind = "none" and distill.loss.kd = 0 to distil text only',
            key="score.kind",
            **where,
        )
    if teacher.quantized_from:
        warnings.append(
            f"the teacher's weights come from {teacher.quantized_from}: its distributions are those of a quantized model "
            "(dequantized to full precision)"
        )
    layers = recipe.student.layers
    if isinstance(layers, int) and layers > student.layers or isinstance(layers, tuple) and max(layers) >= student.layers:
        raise RecipeError(f"{recipe.student.model} has {student.layers} layers", key="student.layers", **where)
    if layers != "all" and recipe.heal is None and recipe.distill.method == "lora":
        warnings.append("a pruned student is distilled by LoRA without [heal]: expect it to learn slowly")
    for key, section, facts in (("adapt", recipe.adapt, teacher), ("distill", recipe.distill, student)):
        if section is not None and section.method != "full":
            try:
                check_targets(facts.config(), section.lora.targets)
            except UsageError as error:
                raise RecipeError(error.message, error.hint, key=f"{key}.lora.targets", **where) from None
    if recipe.distill.method == "qlora" and not Path("/dev/nvidiactl").exists():
        raise RecipeError(
            "QLoRA needs a CUDA device, and this machine has none", 'set method = "lora"', key="distill.method", **where
        )
    for found in leaks(inputs.prompts, inputs.suites)[:1] or leaks(inputs.gold, inputs.suites)[:1]:
        raise RecipeError(
            f"the prompt {found.prompt[:60]!r} stands in the training rows and in a suite",
            "remove it from one of the files: a score on seen prompts proves nothing",
            key="suites",
            **where,
        )
    for target in inputs.targets:
        warnings += _refuse_target(inputs, target)
    return warnings


def _refuse_target(inputs: Inputs, target: Target) -> list[str]:
    """Refuse a file size that no type can meet; warn where the chosen one is estimated above it."""
    from edgedistill.formats.gguf.types import estimate_file_size, file_type, fits, smallest_type

    if target.runtime.format == "onnx":
        if not package_version("onnxruntime-genai"):
            raise UsageError(
                f"target {target.name}: ONNX needs onnxruntime-genai, which is not installed",
                "pip install 'edgedistill[onnx]'",
            )
        return []
    limit, warnings = target.limits.file_size, []
    layers = student_layers(inputs)
    config = inputs.student.facts.config(layers)
    wanted = target.quantize.type
    options = {"embedding_type": target.quantize.embedding_type, "output_type": target.quantize.output_type}
    size = estimate_file_size(config, layers, wanted, imatrix=target.quantize.imatrix, **options)
    if limit is not None:
        best, least = smallest_type(config, layers)
        if least > limit:
            raise RecipeError(
                f"no type brings this student under {format_size(limit)}: the smallest, {best}, makes about {format_size(least)}",
                "take fewer layers or a smaller student, or raise the limit",
                file=target.path,
                key="limits.file_size",
            )
        if size > limit:
            warnings.append(
                f"{target.name}: {wanted} makes about {format_size(size)}, over its file_size of {format_size(limit)}"
            )
    base = file_type(wanted).base
    if fits(base, inputs.student.facts.hidden) != base:
        warnings.append(
            f"{target.name}: {inputs.student.facts.hidden} columns are no multiple of 256, so much of {wanted} falls back to "
            f"larger types (quantize says which): about {format_size(size)}"
        )
    return warnings


def student_layers(inputs: Inputs) -> int:
    """Return how many layers the student has after shaping."""
    layers = inputs.recipe.student.layers
    if layers == "all":
        return inputs.student.facts.layers
    return layers if isinstance(layers, int) else len(layers)


# ── the graph ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def expand(inputs: Inputs) -> Plan:
    """Make the plan of one recipe for its targets."""
    return _Expander(inputs).plan()


class _Expander:
    """Adds the steps of one recipe, from the base models to the packages."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.recipe, self.graph = inputs, inputs.recipe, Graph()
        self.host = host_fingerprint()
        self.isa = digest([self.host.arch, sorted(self.host.features)])[:16]
        self.gguf_tool = f"gguf {package_version('gguf')}"
        self.llama = f"llama-cpp-python {package_version('llama-cpp-python')}"
        self.onnx = f"onnxruntime-genai {package_version('onnxruntime-genai')}"
        self.tokens = sum(map(row_tokens, inputs.prompts)) * inputs.recipe.generate.samples
        self.layers = student_layers(inputs)
        self.t_params = inputs.teacher.facts.params()
        self.s_params = inputs.student.facts.params(self.layers)
        self.checks = inputs.prompts[:64]

    def plan(self) -> Plan:
        warnings = refuse(self.inputs)
        recipe, seed = self.recipe, self.recipe.seed
        base_teacher = self._base("base/teacher", self.inputs.teacher)
        base_student = self._base("base/student", self.inputs.student)
        teacher = self._adapt(base_teacher)
        scores = self._evaluate("evaluate/teacher", teacher, "model", self.t_params, kind="decode")
        rows = rows_digest(self.inputs.prompts)
        answers = self.graph.add(
            "generate",
            Generate(
                teacher=teacher,
                rows_digest=rows,
                rows=self.inputs.prompts,
                seed=seed,
                scores=scores,
                min_score=recipe.teacher.min_score,
                **recipe.generate.model_dump(),
            ),
            Work(kind="decode", amount=2 * self.t_params * self.tokens),
            memory=2 * self.t_params + RUNTIME_MIB * MIB,
            disk=len(self.inputs.prompts) * recipe.generate.samples * 600,
        )
        kept = self.graph.add(
            "filter",
            Filter(
                answers=answers,
                rows_digest=rows,
                rows=self.inputs.prompts,
                filters=tuple(f.model_dump() for f in recipe.filter),
            ),
            Work(kind="bytes", amount=len(self.inputs.prompts) * 1000.0),
            disk=len(self.inputs.prompts) * 800,
        )
        targets = self._score(teacher, kept)
        healed = self._heal(self._shape(base_student), kept)
        student = self._distill("distill/1", "merge", healed, kept, targets)
        self._artifacts(teacher, base_teacher, student, healed, kept, scores)
        plan = Plan(
            identity=digest([str(self.inputs.path.absolute()), recipe.name]),
            steps=self.graph.steps(),
            warnings=warnings,
            packages=self.packages,
        )
        check_machine(plan)
        return plan

    # models and training

    def _base(self, name: str, model: Resolved) -> Key:
        dequantize = model.path.is_file()
        stage = Base(
            source_digest=model.digest, dtype="float32", tool=self.gguf_tool if dequantize else "", path=model.path
        )
        size = 4 * model.facts.params() if dequantize else model.facts.size
        return self.graph.add(name, stage, Work(kind="bytes", amount=size), memory=size + 300 * MIB, disk=size * dequantize)

    def _adapt(self, base: Key) -> Key:
        if self.recipe.adapt is None:
            return base
        gold = self.inputs.gold
        stage = Adapt(
            model=base,
            rows_digest=rows_digest(gold),
            rows=gold,
            training=self.recipe.adapt.model_dump(exclude={"files", "rows"}),
            seed=self.recipe.seed,
        )
        tokens = sum(map(row_tokens, gold)) * self.recipe.adapt.epochs
        full = self.recipe.adapt.method == "full"
        return self.graph.add(
            "adapt",
            stage,
            train_work(self.t_params, tokens, full=full),
            memory=train_memory(self.t_params, full=full),
            disk=4 * self.t_params + 200 * MIB,
        )

    def _score(self, teacher: Key, kept: Key) -> Key | None:
        score = self.recipe.score
        if score.kind == "none":
            return None
        stage = Score(
            teacher=teacher,
            kept=kept,
            kind=score.kind,
            n=score.n,
            temperature=score.temperature or self.recipe.distill.loss.temperature,
            seed=self.recipe.seed,
        )
        return self.graph.add(
            "score",
            stage,
            Work(kind="forward", amount=2 * self.t_params * self.tokens),
            memory=2 * self.t_params + RUNTIME_MIB * MIB,
            disk=self.tokens * 48,
        )

    def _shape(self, base: Key) -> Key:
        layers = self.recipe.student.layers
        if layers == "all":
            return base
        return self.graph.add(
            "shape",
            Shape(model=base, layers=layers),
            Work(kind="bytes", amount=4 * self.s_params),
            memory=8 * self.s_params,
            disk=4 * self.s_params,
        )

    def _heal(self, student: Key, kept: Key) -> Key:
        heal = self.recipe.heal
        if heal is None:
            return student
        return self.graph.add(
            "heal",
            Heal(student=student, kept=kept, training=heal.model_dump(), seed=self.recipe.seed),
            train_work(self.s_params, self.tokens * heal.epochs, full=True),
            memory=train_memory(self.s_params, full=True),
            disk=16 * self.s_params,
        )

    def _distill(
        self, name: str, merge_name: str, student: Key, kept: Key, targets: Key | None, *, gold: bool = False
    ) -> Key:
        """Add distill and, for an adapter, merge; return the key of the entry that holds ``model/``."""
        settings = self.recipe.distill
        loss = {"kd": 0.0, "ce": 1.0, "divergence": "forward-kl", "temperature": 1.0} if gold else settings.loss.model_dump()
        full = settings.method == "full"
        stage = Distill(
            student=student,
            kept=kept,
            text="reference" if gold else "text",
            targets=None if gold else targets,
            training=settings.model_dump(exclude={"loss"}),
            loss=loss,
            seed=self.recipe.seed,
        )
        trained = self.graph.add(
            name,
            stage,
            train_work(self.s_params, self.tokens * settings.epochs, full=full),
            memory=train_memory(self.s_params, full=full),
            disk=(16 if full else 1) * self.s_params,
        )
        if full:
            return trained
        return self.graph.add(
            merge_name,
            Merge(student=student, adapter=trained, kept=kept),
            Work(kind="bytes", amount=4 * self.s_params),
            memory=12 * self.s_params + RUNTIME_MIB * MIB,
            disk=4 * self.s_params,
        )

    # artifacts

    def _convert(self, name: str, model: Key, params: int) -> Key:
        stage = Convert(model=model, dtype="f16", tool=self.gguf_tool, rows=self.checks)
        return self.graph.add(
            name,
            stage,
            Work(kind="convert", amount=2 * params),
            memory=8 * params + RUNTIME_MIB * MIB,
            disk=2 * params + 4 * MIB,
        )

    def _artifacts(self, teacher: Key, base: Key, student: Key, healed: Key, kept: Key, scores: Key) -> None:
        """Add everything after training: containers, types, evaluation, measurement, packages and baselines."""
        recipe, baselines = self.recipe, self.recipe.baselines
        self.packages: dict[str, Key] = {}
        teacher_gguf = self._convert("convert/teacher", teacher, self.t_params)
        student_gguf = self._convert("convert/student", student, self.s_params)
        references = {"student": student_gguf, "teacher": teacher_gguf}
        imatrix = self._calibrate("calibrate", student_gguf, kept, self.s_params)
        quantized: list[tuple[Target, Key, str]] = []
        for target in self.inputs.targets:
            onnx = target.runtime.format == "onnx"
            key = self._quantize(
                f"quantize/{target.name}",
                student if onnx else student_gguf,
                imatrix if target.quantize.imatrix and not onnx else None,
                target.runtime.format,
                target.quantize.type,
                target.quantize.embedding_type,
                target.quantize.output_type,
                self.s_params,
            )
            quantized.append((target, key, "onnx" if onnx else "model.gguf"))
        student_scores = self._evaluate("evaluate/student", student_gguf, "model.gguf", self.s_params)
        evaluations = [
            self._evaluate(f"evaluate/{t.name}", key, file, self.s_params, references=references, grammar=True)
            for t, key, file in quantized
        ]
        if baselines.few_shot:
            base_gguf = self._convert("convert/base", base, self.t_params)
            self._evaluate("evaluate/base-few-shot", base_gguf, "model.gguf", self.t_params, shots=baselines.few_shot)
        if baselines.gold_sft:
            gold = self._distill("distill/gold-sft", "merge/gold-sft", healed, kept, None, gold=True)
            gold_gguf = self._convert("convert/gold-sft", gold, self.s_params)
            self._evaluate("evaluate/gold-sft", gold_gguf, "model.gguf", self.s_params)
        if baselines.quantized_teacher:
            teacher_imatrix = self._calibrate("calibrate/teacher", teacher_gguf, kept, self.t_params)
            small = self._quantize(
                "quantize/teacher", teacher_gguf, teacher_imatrix, "gguf", baselines.quantized_teacher, None, None, self.t_params
            )
            self._evaluate("evaluate/quantized-teacher", small, "model.gguf", self.t_params)
            self._measure("measure/quantized-teacher", small, "model.gguf", None, None)
        self._measure("measure/teacher", teacher_gguf, "model.gguf", None, None)
        self._measure("measure/student", student_gguf, "model.gguf", None, None)
        measured = [
            self._measure(f"measure/{target.name}", key, file, teacher_gguf, target) for target, key, file in quantized
        ]
        for (target, key, file), evaluation, measurement in zip(quantized, evaluations, measured, strict=True):
            self.packages[target.name] = self._package(
                target, key, file, evaluation, measurement, scores, student_scores, teacher_gguf
            )

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

    def _quantize(
        self,
        name: str,
        model: Key,
        calibration: Key | None,
        format_: str,
        type_: str,
        embedding: str | None,
        output: str | None,
        params: int,
    ) -> Key:
        stage = Quantize(
            model=model,
            calibration=calibration,
            format=format_,
            type=type_,
            embedding_type=embedding,
            output_type=output,
            tool=self.onnx if format_ == "onnx" else self.llama,
            rows=self.checks,
        )
        kind, size = ("build-onnx", 4 * params) if format_ == "onnx" else ("quantize", 2 * params)
        return self.graph.add(name, stage, Work(kind=kind, amount=size), memory=6 * params + 300 * MIB, disk=size)

    def _evaluate(
        self,
        name: str,
        model: Key,
        file: str,
        params: int,
        *,
        kind: str = "",
        references: Mapping[str, Key] | None = None,
        grammar: bool = False,
        shots: int = 0,
    ) -> Key:
        specs = tuple(
            SuiteSpec(
                name=suite,
                digest=rows_digest(rows),
                metric=spec.metric,
                max_new_tokens=spec.max_new_tokens,
                grammar=self._grammar(spec) if grammar else None,
            )
            for suite, rows in self.inputs.suites.items()
            for spec in [self.recipe.suites[suite]]
        )
        kind = kind or ("decode-onnx" if file == "onnx" else "decode-gguf")
        tokens = sum(sum(map(row_tokens, rows)) for rows in self.inputs.suites.values())
        tokens += sum(sum(map(row_tokens, self.inputs.suites[spec.name])) for spec in specs if spec.grammar)
        stage = Evaluate(
            model=model,
            file=file,
            suites=specs,
            shots=_shots(self.inputs.gold, shots),
            references=dict(references or {}),
            build={"decode": "transformers", "decode-onnx": self.onnx}.get(kind, self.llama),
            isa=self.isa,
            rows=self.inputs.suites,
        )
        return self.graph.add(
            name,
            stage,
            Work(kind=kind, amount=2 * params * tokens),
            memory=4 * params + RUNTIME_MIB * MIB,
            disk=sum(len(rows) for rows in self.inputs.suites.values()) * 400,
        )

    def _grammar(self, suite: Suite) -> str | None:
        if suite.grammar is None:
            return None
        path = self.inputs.path.parent / suite.grammar
        try:
            return path.read_text()
        except OSError as error:
            raise RecipeError(
                f"{path}: {error.strerror}", "write the GBNF grammar there, or leave the key out", file=self.inputs.path, key="grammar"
            ) from None

    def _measure(self, name: str, model: Key, file: str, baseline: Key | None, target: Target | None) -> Key:
        prompts = next((rows[:24] for s, rows in self.inputs.suites.items() if self.recipe.suites[s].metric != "perplexity"), ())
        prompts = prompts or self.inputs.prompts[:24]
        cores = os.cpu_count() or 1
        stage = Measure(
            model=model,
            file=file,
            baseline=baseline,
            threads=min(target.runtime.threads, cores) if target else cores,
            context=target.runtime.context if target else 2048,
            device=self.host.digest,
            build=self.onnx if file == "onnx" else self.llama,
            prompts_digest=rows_digest(prompts),
            prompts=tuple(prompts),
        )
        return self.graph.add(name, stage, Work(kind="measure", amount=15 * MEASURE_SECONDS), memory=600 * MIB)

    def _package(
        self, target: Target, key: Key, file: str, evaluation: Key, measurement: Key, scores: Key, student: Key, reference: Key
    ) -> Key:
        gates = self.recipe.gates.model_dump()
        for name in ("min_speedup", "min_shrink"):
            if isinstance(gates[name], dict):
                gates[name] = gates[name].get(target.name)
        same, why = matches_host(target, self.host)
        grammar = next((text for s in self.recipe.suites.values() if (text := self._grammar(s))), None)
        sources = {
            model.source: {
                "source": model.source,
                "revision": model.revision,
                "digest": model.digest,
                "licence": model.facts.licence,
                "quantized_from": model.facts.quantized_from,
            }
            for model in (self.inputs.teacher, self.inputs.student)
        }
        tokens = [s.max_new_tokens for s in self.recipe.suites.values() if s.metric != "perplexity"]
        stage = Package(
            model=key,
            file=file,
            evaluation=evaluation,
            measurement=measurement,
            teacher=scores,
            student=student,
            reference=reference,
            recipe=self.recipe.name,
            target={"name": target.name, **target.model_dump(mode="json")},
            unproved="" if same else why,
            gates=gates,
            sources=tuple(sources.values()),
            generation={"temperature": 0.0, "max_new_tokens": max(tokens, default=64), "context": target.runtime.context},
            grammar=grammar,
            ship_anyway=self.inputs.ship_anyway,
            all_keys={name: str(step.key) for step in self.graph.steps() for name in step.ids},
            example=tuple(self.inputs.prompts[0].messages),
        )
        return self.graph.add(f"package/{target.name}", stage, Work(kind="bytes", amount=2.0 * self.s_params))


def _shots(gold: tuple[Row, ...], count: int) -> tuple[dict[str, str], ...]:
    """Choose training examples for the few-shot prompt: the first of each tag, in the order of the file."""
    if not count:
        return ()
    seen: dict[str, Row] = {}
    for row in gold:
        seen.setdefault(row.tags[0] if row.tags else row.id, row)
    return tuple(
        {"prompt": str(row.messages[-1]["content"]), "reference": row.reference or ""} for row in list(seen.values())[:count]
    )


# ── estimates ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def row_tokens(row: Row) -> int:
    """Estimate the tokens of a row, template included: about 3.3 characters a token, 6 tokens around each message."""
    characters = sum(len(str(message["content"])) for message in row.messages) + len(row.reference or " " * 80)
    return int(characters / 3.3) + 6 * (len(row.messages) + 1)


def train_work(params: int, tokens: float, *, full: bool) -> Work:
    """Operations of training: forward and backward through the activations, and the weights' gradients in full training."""
    return Work(kind="train-full" if full else "train", amount=(6 if full else 4) * params * tokens)


def train_memory(params: int, *, full: bool) -> int:
    """Bytes of training: fp32 weights, gradients and two moments in full; bf16 weights for an adapter; activations."""
    return (18 if full else 3) * params + (RUNTIME_MIB + 1200) * MIB


def check_machine(plan: Plan) -> None:
    """Refuse a plan that this machine has not the memory for."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return
    worst = max(plan.steps, key=lambda step: step.memory)
    if worst.memory > memory:
        raise UsageError(
            f"{worst.id} needs about {format_size(worst.memory)} of memory; this machine has {format_size(memory)}",
            "take a smaller model, or train by LoRA instead of in full",
        )
