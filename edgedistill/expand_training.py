"""The steps that a recipe has once, or once a link: base models, adapting, soft targets, the student up to its merge.

``expand.py`` puts them in order and adds what is made of the results.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from edgedistill.chat import read_chat
from edgedistill.data.prompts import Row, rows_digest
from edgedistill.data.verdicts import Verdict, changes
from edgedistill.devices.host import fingerprint as host_fingerprint
from edgedistill.fingerprint import Key, canonical_json, digest
from edgedistill.inputs import (
    Inputs,
    chosen_layers,
    cut_rows,
    keyed_metric,
    read_reviews,
    read_schema,
    student_facts,
    taught_rows,
)
from edgedistill.models import Resolved
from edgedistill.plan import Graph, package_version
from edgedistill.rates import (
    MIB,
    RUNTIME_MIB,
    Work,
    base_memory,
    ffn_work,
    merge_memory,
    row_tokens,
    train_memory,
    train_work,
)
from edgedistill.recipe_base import Training
from edgedistill.recipe_teacher import Another
from edgedistill.refusals import refuse
from edgedistill.refusals_prompts import guides
from edgedistill.served import KIND as SERVED_KIND
from edgedistill.stages.adapt import Adapt
from edgedistill.stages.base import Base, Gguf, Served
from edgedistill.stages.distill import Distill, DistillBeside, DistillCached, DistillServed
from edgedistill.stages.heal import Heal
from edgedistill.stages.merge import Merge
from edgedistill.stages.score import Score, ScoreGguf, ScoreMixed, ScoreServed, ScoreSeveral
from edgedistill.stages.shape import MeasuredShape, Shape
from edgedistill.stages.states import States
from edgedistill.stages.temper import Temper
from edgedistill.training.objectives import even_pairs
from edgedistill.training.precision import cpu_computes_bf16

ON_POLICY = ("on_policy", "on_policy_tokens", "on_policy_temperature")  # of no matter where nothing is written


@dataclass(frozen=True, kw_only=True)
class Other:
    """A teacher beside the first one, as it stands in the graph. ``scores``: its distributions are in the student's tokens, and its
    weights here; ``proof`` is its evaluation, where it has to prove itself.
    """

    spec: Another
    model: Resolved
    key: Key
    scores: bool
    proof: Key | None


class TrainingSteps:
    """Adds the steps that train, for ``inputs`` and ``recipe``: while a chain is laid out, those of the link at hand."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.recipe, self.graph = inputs, inputs.recipe, Graph()
        self.warnings = refuse(inputs)
        self.host = host_fingerprint()
        self.isa = self.host.isa
        self.gguf_tool = f"gguf {package_version('gguf')}"
        self.llama = f"llama-cpp-python {package_version('llama-cpp-python')}"
        self.onnx = f"onnxruntime-genai {package_version('onnxruntime-genai')}"
        self.tokens = sum(map(row_tokens, inputs.prompts)) * inputs.recipe.generate.samples
        self.t_params = inputs.teacher.facts.params()
        self.s_params = student_facts(inputs).params()
        self.checks = inputs.prompts[:64]
        self.server = inputs.server
        self.manner = self.server.manner if self.server else ""
        rows = [*inputs.prompts, *itertools.chain.from_iterable(inputs.suites.values())]
        self.chat = read_chat(inputs.teacher) if self.server and any(row.tools for row in rows) else None
        self.in_gguf = inputs.recipe.teacher.backend == "llama_cpp"
        self.others: list[Other] = []
        self.asked: Key | None = (
            None  # the teacher, and the model with the tokens that one without a tokenizer is asked about
        )
        self.whole_student: Key | None = None

    def _base(self, name: str, model: Resolved) -> Key:
        if model.kind == SERVED_KIND:
            assert model.server is not None
            return self.graph.add(name, Served(identity=model.server.identity), Work(kind="bytes", amount=1000.0))
        dequantize = model.path.is_file()
        stage = Base(
            source_digest=model.digest,
            dtype="float32",
            tool=self.gguf_tool if dequantize else "",
            path=model.path,
            chat_template=model.template and model.template.text,
            end_of_turn=model.template and model.template.end,
        )
        size = 4 * model.facts.params() if dequantize else model.facts.size
        return self.graph.add(
            name, stage, Work(kind="bytes", amount=size), memory=base_memory(size), disk=size * dequantize
        )

    def _calls(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Return how text is made of the calls of a server's, where rows have tools."""
        if self.chat is None or not any(row.tools for row in rows):
            return {}
        return {"template": digest([self.chat.for_tools, self.chat.bos, self.chat.eos]), "chat": self.chat}

    def _generate(self) -> dict[str, Any]:
        """Return how the teacher answers, as a step's key holds it, with what the file that it names says."""
        fields, file = (
            self.recipe.generate.model_dump(exclude={"json_schema", "pilot"}),
            self.recipe.generate.json_schema,
        )
        if file is not None:
            # in the file's order, which is that of the answer
            fields["json_schema"] = json.dumps(read_schema(self.inputs, file, "generate.json_schema"))
        return fields

    def _filters(self, samples: int, *, analysed: bool = False) -> tuple[dict[str, Any], ...]:
        """Return the filters as a step's key holds them, with what the files that they name say; each prompt was asked ``samples``
        times. ``analysed``: corrections that the teacher writes are another step's.
        """
        found = []
        for at, one in enumerate(self.recipe.filter):
            fields = one.keyed(*(("analysis", "corrections") if one.analysis and analysed else ()))
            fields["metric"] = keyed_metric(self.inputs, one.metric, f"filter.{at}.metric")
            if one.json_schema is not None:
                fields["json_schema"] = canonical_json(
                    read_schema(self.inputs, one.json_schema, f"filter.{at}.json_schema")
                )
            if one.file is not None:  # its digest, as with suites
                fields["file"] = changes(read_reviews(self.inputs)[one.file])
            if one.kind == "agreement":
                fields["samples"] = samples
            if one.kind == "decontaminate":
                fields["suites"] = {name: rows_digest(rows) for name, rows in self.inputs.suites.items()}
            found.append(fields)
        return tuple(found)

    def _reviews(self) -> dict[str, dict[str, Verdict]]:
        """Return the verdicts that the filters go by, under the digests that stand in their keys."""
        return {changes(verdicts): verdicts for verdicts in read_reviews(self.inputs).values()}

    def _train_memory(self, params: int, table: Training, *, full: bool, beside: int = 0) -> int:
        """Return the bytes of a training here, by a table's optimizer."""
        return train_memory(params, full=full, bf16=cpu_computes_bf16(), optimizer=table.optimizer, beside=beside)

    def _base_teacher(self) -> Key:
        """Add the teacher as it comes; a GGUF file that llama.cpp runs needs no other container."""
        return self._as_it_comes(self.inputs.teacher, "teacher", gguf=self.in_gguf)

    def _as_it_comes(self, model: Resolved, name: str, *, gguf: bool) -> Key:
        if not gguf:
            return self._base(f"base/{name}", model)
        return self.graph.add(
            f"convert/{name}",
            Gguf(source_digest=model.digest, path=model.path),
            Work(kind="bytes", amount=model.facts.size),
        )

    def _adapt(self, base: Key) -> Key:
        if self.recipe.adapt is None:
            return base
        gold = self.inputs.gold
        stage = Adapt(
            model=base,
            rows_digest=rows_digest(gold),
            rows=gold,
            training=self.recipe.adapt.keyed("files", "rows"),
            seed=self.recipe.seed,
        )
        tokens = sum(map(row_tokens, gold)) * self.recipe.adapt.epochs
        full = self.recipe.adapt.method == "full"
        memory = self._train_memory(self.t_params, self.recipe.adapt, full=full)
        return self.graph.add(
            "adapt",
            stage,
            train_work(self.t_params, tokens, full=full),
            memory=memory if full else max(memory, merge_memory(self.t_params)),  # it merges what it trained
            disk=4 * self.t_params + 200 * MIB,
        )

    def _score(self, name: str, teacher: Key, kept: Key) -> Key | None:
        score = self.recipe.score
        if not self.recipe.stores_targets:
            return None
        assert score.kind != "none" and score.kind != "dense"  # neither stores any
        stage = Score(
            teacher=teacher,
            kept=kept,
            kind=score.kind,
            n=score.n,
            temperature=score.temperature or self.recipe.distill.loss.temperature,
            seed=self.recipe.seed,
            guided=teacher == self.asked and guides(self.inputs),
        )
        work, memory = Work(kind="forward", amount=2 * self.t_params * self.tokens), 2 * self.t_params
        if (
            teacher == self.asked
            and not (self.server or self.in_gguf)
            and (able := [one for one in self.others if one.scores])
        ):
            fields, params = stage.fields(), [one.model.facts.params() for one in able]
            if score.combine and (mixed := tuple(one.key for one in able if one.spec.role == "ensemble")):
                stage = ScoreMixed(**fields, others=mixed, combine=score.combine)
                work, memory = (
                    replace(work, amount=2 * (self.t_params + sum(params)) * self.tokens),
                    memory + 2 * sum(params),
                )
            else:
                stage = ScoreSeveral(**fields, writers=tuple((one.spec.name, one.key) for one in able))
                work, memory = (
                    replace(work, amount=2 * max(self.t_params, *params) * self.tokens),
                    2 * max(self.t_params, *params),
                )
        asked = self.server if score.kind == "top-k" and teacher == self.asked else None  # not of a link of a chain
        if asked or self.in_gguf:
            assert self.whole_student is not None
            fields = {**stage.fields(), "student": self.whole_student}
            stage = ScoreServed(**fields, server=asked, manner=self.manner) if asked else ScoreGguf(**fields)
            work = Work(kind="served-scores", amount=self.tokens) if asked else replace(work, kind="forward-gguf")
        return self.graph.add(
            name,
            stage,
            work,
            memory=memory + RUNTIME_MIB * MIB,
            disk=self.tokens * 4 * max(score.n, 12),  # 12 draws take less than 48 bytes, measured
        )

    def _shape(self, name: str, base: Key) -> Key:
        student = self.recipe.student
        if student.layers == "all" and (student.hidden, student.ffn, student.vocabulary) == (None, None, None):
            return base
        rows, taught, whole = cut_rows(self.inputs), taught_rows(self.inputs), self.inputs.student.facts
        measured = student.layers_by == "importance"
        fields: dict[str, Any] = {
            "model": base,
            "layers": () if measured else chosen_layers(self.inputs),
            "hidden": student.hidden,
            "ffn": student.ffn,
            "rows_digest": rows_digest(rows),
            "rows": rows,
            "vocabulary": student.vocabulary,
            "taught_digest": rows_digest(taught),
            "taught": taught,
        }
        stage = MeasuredShape(**fields, keep=len(chosen_layers(self.inputs))) if measured else Shape(**fields)
        tokens = sum(map(row_tokens, rows))
        work = Work(kind="bytes", amount=4 * self.s_params)
        if student.ffn:
            work = ffn_work(whole.params(), whole.layers, whole.ffn, tokens)
        elif student.hidden:
            work = Work(kind="shape", amount=tokens * (2 * whole.params() + 4 * whole.layers * whole.hidden**2))
        return self.graph.add(
            name,
            stage,
            work,
            memory=(16 if student.hidden else 8) * whole.params()
            + ((RUNTIME_MIB + 1500) * MIB if student.ffn or student.hidden else 0),
            disk=4 * self.s_params,
        )

    def _heal(self, name: str, student: Key, kept: Key, teacher: Key) -> Key:
        """Add the healing of a pruned student, with the teacher's hidden states where the recipe asks for them."""
        heal = self.recipe.heal
        if heal is None:
            return student
        rows = self.inputs.healing
        training = heal.keyed("files", "rows")
        guided = heal.hidden > 0
        stage = Heal(
            student=student,
            kept=None if rows else kept,
            rows_digest=rows_digest(rows),
            rows=rows,
            teacher=teacher if guided else None,
            layers=() if self.recipe.student.layers_by == "importance" else chosen_layers(self.inputs),
            training=training,
            seed=self.recipe.seed,
        )
        tokens = (sum(map(row_tokens, rows)) if rows else self.tokens) * heal.epochs
        work = train_work(self.s_params, tokens, full=True)
        if guided:
            work = replace(work, amount=work.amount + 2 * self.t_params * tokens)
        return self.graph.add(
            name,
            stage,
            work,
            memory=self._train_memory(self.s_params, heal, full=True, beside=guided * self.t_params),
            disk=16 * self.s_params,
        )

    def _beside(self, teacher: Key) -> Key | None:
        """Return the teacher where it runs beside its student: for its whole distributions, or for its hidden states."""
        features = self.recipe.distill.features
        whole = self.recipe.score.kind == "dense" and self.recipe.distill.loss.kd > 0
        return teacher if whole or (features is not None and features.on and not features.cached) else None

    def _states(self, name: str, teacher: Key, kept: Key) -> Key | None:
        """Add the storing of the teacher's hidden states, where the recipe asks for it."""
        features = self.recipe.distill.features
        if features is None or not (features.on and features.cached):
            return None
        layers = tuple(sorted({of_teacher for of_teacher, _ in self._pairs()}))
        return self.graph.add(
            name,
            States(teacher=teacher, kept=kept, layers=layers),
            Work(kind="forward", amount=2 * self.t_params * self.tokens),
            memory=2 * self.t_params + RUNTIME_MIB * MIB,
            disk=2 * len(layers) * self.inputs.teacher.facts.hidden * self.tokens,
        )

    def _pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the pairs of layers (teacher's, student's) whose hidden states are compared."""
        features = self.recipe.distill.features
        assert features is not None
        if features.pairs != "even":
            return tuple((of_teacher, at) for of_teacher, at in features.pairs)
        return even_pairs(self.inputs.teacher.facts.layers, student_facts(self.inputs).layers)

    def _temper(self, student: Key, name: str = "temper") -> Key:
        """Add the fit of one temperature, where the recipe asks for it."""
        if self.recipe.temperature is None:
            return student
        rows = self.inputs.tempering
        return self.graph.add(
            name,
            Temper(student=student, rows_digest=rows_digest(rows), rows=rows),
            Work(kind="forward", amount=2 * self.s_params * sum(map(row_tokens, rows))),
            memory=12 * self.s_params + RUNTIME_MIB * MIB,
            disk=4 * self.s_params,
        )

    def _distill(
        self,
        name: str,
        merge_name: str,
        student: Key,
        kept: Key,
        targets: Key | None,
        *,
        teacher: Key | None = None,
        states: Key | None = None,
        gold: bool = False,
        beside: type[DistillBeside] = DistillBeside,
    ) -> Key:
        """Add distill and, for an adapter, merge; return the key of the entry that holds ``model/``. With a ``teacher`` beside the
        student the stage is ``beside``; ``states`` are its hidden states, stored.
        """
        settings = self.recipe.distill
        loss = (
            {"kd": 0.0, "ce": 1.0, "divergence": "forward-kl", "temperature": 1.0}
            if gold
            else settings.loss.model_dump(exclude_none=True)
        )
        full, keep = settings.method == "full", settings.keep
        unused = (
            *(() if settings.on_policy and not gold else ON_POLICY),
            *(() if settings.features and settings.features.on and not gold else ("features",)),
            *(("curriculum",) if gold and settings.curriculum == "confidence" else ()),  # no targets, no confidence
        )
        training = settings.keyed("loss", "seed", "keep", *unused)
        if "features" in training:
            training["features"].pop("cached", None)  # where they come from, not what is compared
        if keep is not None:
            training["keep"] = {**keep.keyed("files", "rows"), "rows_digest": rows_digest(self.inputs.general)}
        fields: dict[str, Any] = {
            "student": student,
            "kept": kept,
            "text": "reference" if gold else "text",
            "targets": None if gold else targets,
            "training": training,
            "loss": loss,
            "seed": self.recipe.seed if settings.seed is None else settings.seed,
            "general": self.inputs.general,
        }
        stage = Distill(**fields) if teacher is None else beside(**fields, teacher=teacher)
        if states is not None:
            stage = DistillCached(**fields, states=states, pairs=self._pairs())
        if self.server is not None and self.server.launch is None and settings.on_policy and not gold:
            assert self.whole_student is not None and self.asked is not None
            more = {"teacher": self.asked, "tokens": self.whole_student, "n": self.recipe.score.n}
            stage = DistillServed(**fields, **more, server=self.server)
        tokens = self.tokens * settings.epochs
        work = train_work(self.s_params, tokens, full=full)
        if teacher is not None:
            work = replace(work, amount=work.amount + 2 * self.t_params * tokens)
        if settings.on_policy and not gold:
            # a token at a time: at about half the rate of training
            written = len(self.inputs.prompts) * settings.epochs * settings.on_policy * settings.on_policy_tokens
            work = replace(work, amount=work.amount + 2 * 2 * self.s_params * written)
        along = (teacher is not None) * self.t_params
        if keep is not None:
            rows = len(self.inputs.prompts) * self.recipe.generate.samples * settings.epochs * keep.share
            general = rows * sum(map(row_tokens, self.inputs.general)) / len(self.inputs.general)
            more = train_work(self.s_params, general, full=full).amount + 2 * self.s_params * general
            work = replace(work, amount=work.amount + more)
            along += full * self.s_params  # the start; that of an adapter is the model without it
        trained = self.graph.add(
            name,
            stage,
            work,
            memory=self._train_memory(self.s_params, settings, full=full, beside=along),
            disk=(16 if full else 1) * self.s_params,
        )
        if full:
            return trained
        return self.graph.add(
            merge_name,
            Merge(student=student, adapter=trained, kept=kept),
            Work(kind="bytes", amount=4 * self.s_params),
            memory=merge_memory(self.s_params),
            disk=4 * self.s_params,
        )
