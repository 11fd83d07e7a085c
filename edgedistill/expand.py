"""Recipe x targets -> the graph of steps, each with an estimate. Chains, baselines and targets are more steps, not
special cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from edgedistill.compare import step_of
from edgedistill.data.prompts import rows_digest
from edgedistill.data.thinking import BLOCKS
from edgedistill.errors import RecipeError
from edgedistill.evals.metrics import AFTER_THINKING, LABEL
from edgedistill.expand_draft import DraftSteps
from edgedistill.expand_quantize import QuantizeSteps
from edgedistill.expand_rounds import RoundSteps
from edgedistill.expand_text import TextSteps
from edgedistill.expand_training import Other
from edgedistill.fingerprint import Key, digest
from edgedistill.inputs import (
    Inputs,
    along_chain,
    few_shots,
    keyed_metric,
    sources,
    student_facts,
)
from edgedistill.kv_cache import F16, Pair
from edgedistill.models import Resolved
from edgedistill.pairing import tokens_differ
from edgedistill.plan import Plan, check_machine
from edgedistill.rates import MIB, RUNTIME_MIB, Work, row_tokens
from edgedistill.recipe import Suite
from edgedistill.recipe_teacher import Another
from edgedistill.served import Server
from edgedistill.stages.allocate import Allocate
from edgedistill.stages.base import Gguf
from edgedistill.stages.evaluate import Evaluate, SuiteSpec
from edgedistill.stages.measure import Measure
from edgedistill.stages.package import DraftedPackage, Package
from edgedistill.stages.quantize import Quantize
from edgedistill.stages.tune import Tune
from edgedistill.target import Target, Types, matches_host

MEASURE_SECONDS = 1e9  # work units of "measure" are nominal seconds x 1e9


def expand(inputs: Inputs) -> Plan:
    """Make the plan of one recipe for its targets."""
    return _Expander(inputs).plan()


class _Expander(TextSteps, RoundSteps, DraftSteps, QuantizeSteps):
    """Adds the steps of one recipe, from the base models to the packages."""

    def plan(self) -> Plan:
        recipe = self.recipe
        self.every_target = {*recipe.targets, *(name for link in recipe.chain for name in link.targets)}
        base_teacher = self._base_teacher()
        teacher = self._adapt(base_teacher)
        from_teacher = recipe.student.model == "teacher"
        base_student = teacher if from_teacher else self._base("base/student", self.inputs.student)
        self.asked, self.whole_student = teacher, base_student
        scores = self._prove(teacher)
        self.others = [
            self._other(spec, model) for spec, model in zip(recipe.teachers, self.inputs.others, strict=True)
        ]
        kept = self._text(teacher, scores)
        healed = student = base_student
        before, above, links = teacher, teacher, along_chain(self.inputs)
        whole = self.inputs, self.recipe, self.t_params
        shipping: list[tuple[int, Inputs, Key]] = []
        for number, link in enumerate(links, 1):
            # A link is a student to the model before it, and a teacher to the one after it.
            self.inputs, self.recipe = link, link.recipe
            self.t_params, self.s_params = link.teacher.facts.params(), student_facts(link).params()
            suffix = "" if number == len(links) else f"/{number}"
            targets = self._score(f"score{suffix}", before, kept)
            shaped = self._shape(f"shape{suffix}", base_student if number == 1 else before)
            healed = self._heal(f"heal{suffix}", shaped, kept, before)
            merge = "merge" if number == len(links) + len(recipe.round) else f"merge/{number}"
            states = self._states(f"states{suffix}", before, kept)
            student = self._distill(
                f"distill/{number}", merge, healed, kept, targets, teacher=self._beside(before), states=states
            )
            before, above = student, before
            if number < len(links) and link.targets:
                shipping.append((number, link, student))
        student = self._rounds(student, kept, teacher=teacher, params=whole[2], above=above, done=len(links))
        self.inputs, self.recipe, self.t_params = whole
        self._unpruned(teacher, base_teacher, base_teacher if from_teacher else base_student)
        self._artifacts(teacher, base_teacher, self._temper(student), healed, kept, scores)
        for number, link, intermediate in shipping:
            self._ship_link(number, link, intermediate, teacher, kept, scores)
        if recipe.round:
            # As evaluate/student of the recipe without rounds: what was built of it before is found again.
            first = self._convert("convert/before-rounds", before, self.inputs.student, self.s_params, title="student")
            self._evaluate("evaluate/before-rounds", first, "model.gguf", self.s_params)
        plan = Plan(
            identity=digest([str(self.inputs.path.absolute()), recipe.name]),
            steps=self.graph.steps(),
            warnings=self.warnings,
            packages=self.packages,
        )
        check_machine(plan)
        return plan

    def _prove(self, teacher: Key) -> Key:
        """Evaluate the teacher: one behind a server by what it writes."""
        if self.in_gguf:
            return self._evaluate("evaluate/teacher", teacher, "model.gguf", self.t_params)
        if self.server is None:
            return self._evaluate("evaluate/teacher", teacher, "model", self.t_params, kind="decode")
        written = {name for name, suite in self.recipe.suites.items() if suite.metric != "perplexity"}
        file = "served.json" if self.server.launch is None else "model"
        return self._evaluate("evaluate/teacher", teacher, file, 0, kind="served", only=written)

    def _other(self, spec: Another, model: Resolved) -> Other:
        """Add a teacher beside the first one, and its proof where it has to reach a score before it is asked."""
        gguf, server, params = spec.backend == "llama_cpp", model.server, model.facts.params()
        key, proof = self._as_it_comes(model, f"teacher-{spec.name}", gguf=gguf), None
        if spec.min_score:
            name = f"evaluate/teacher-{spec.name}"
            only = {name for name, suite in self.recipe.suites.items() if suite.metric != "perplexity"}
            if gguf:
                proof = self._evaluate(name, key, "model.gguf", params, only=only)
            elif server is None:
                proof = self._evaluate(name, key, "model", params, kind="decode", only=only)
            else:
                file = "served.json" if server.launch is None else "model"
                proof = self._evaluate(name, key, file, 0, kind="served", only=only, server=server)
        here = not gguf and server is None and not tokens_differ(model, self.inputs.student, self.inputs.prompts)
        return Other(spec=spec, model=model, key=key, scores=here, proof=proof)

    def _unpruned(self, teacher: Key, base_teacher: Key, base: Key) -> None:
        """Evaluate what the student was before it was cut and taught, where suites tell what was forgotten and nothing else
        evaluates it.
        """
        told = {name for name, suite in self.recipe.suites.items() if suite.metric == "perplexity"}
        known = (base == teacher and self.server is None) or (
            base == base_teacher and self.recipe.baselines.few_shot > 0
        )
        if told and not known:
            params = self.inputs.student.facts.params()
            self._evaluate("evaluate/base", base, "model", params, kind="decode", only=told)

    # artifacts

    def _artifacts(self, teacher: Key, base: Key, student: Key, healed: Key, kept: Key, scores: Key) -> None:
        """Add everything after training: containers, types, evaluation, measurement, packages and baselines."""
        baselines = self.recipe.baselines
        self.packages: dict[str, Key] = {}
        teacher_gguf = teacher if self.in_gguf else None
        if self.server is None and not self.in_gguf:
            teacher_gguf = self._convert("convert/teacher", teacher, self.inputs.teacher, self.t_params)
        student_gguf = self._convert("convert/student", student, self.inputs.student, self.s_params)
        references = {"student": student_gguf} | ({"teacher": teacher_gguf} if teacher_gguf else {})
        imatrix = self._calibrate("calibrate", student_gguf, kept, self.s_params)
        quantized: list[tuple[Target, Key, str]] = []
        for target in self.inputs.targets:
            quantized.append((target, *self._typed(target.name, target, student, student_gguf, imatrix, kept)))
        caches = {t.name: self._kv_cache(t.name, t, key, imatrix) for t, key, _ in quantized}
        student_scores = self._evaluate("evaluate/student", student_gguf, "model.gguf", self.s_params)
        evaluations = [
            # onnxruntime-genai reads no GBNF: there the answers are free ones only
            self._evaluate(
                f"evaluate/{t.name}",
                key,
                file,
                self.s_params,
                references=references,
                grammar=file != "onnx",
                kv=caches[t.name][0],
            )
            for t, key, file in quantized
        ]
        if baselines.few_shot:
            # As the teacher is, with whom it is compared. Examples are of [adapt], so its weights are here.
            name, shots = "evaluate/base-few-shot", baselines.few_shot
            self._evaluate(name, base, "model", self.t_params, kind="decode", shots=shots)
        if baselines.gold_sft:
            gold = self._distill("distill/gold-sft", "merge/gold-sft", healed, kept, None, gold=True)
            gold_gguf = self._convert("convert/gold-sft", gold, self.inputs.student, self.s_params)
            self._evaluate("evaluate/gold-sft", gold_gguf, "model.gguf", self.s_params)
        if baselines.quantized_teacher and teacher_gguf:
            teacher_imatrix = self._calibrate("calibrate/teacher", teacher_gguf, kept, self.t_params)
            small = self._quantize(
                "quantize/teacher",
                teacher_gguf,
                teacher_imatrix,
                "gguf",
                Types(type=baselines.quantized_teacher),
                self.t_params,
            )
            self._evaluate("evaluate/quantized-teacher", small, "model.gguf", self.t_params)
            self._measure("measure/quantized-teacher", small, "model.gguf", None, None)
        if teacher_gguf:
            self._measure("measure/teacher", teacher_gguf, "model.gguf", None, None)
        self._measure("measure/student", student_gguf, "model.gguf", None, None)
        measured = [
            self._measure(f"measure/{target.name}", key, file, teacher_gguf, target, caches[target.name][0])
            for target, key, file in quantized
        ]
        wanted = self.recipe.draft.targets if self.recipe.draft else ()
        drafts = {
            target.name: self._draft(target, key, student, caches[target.name][0])
            for target, key, _ in quantized
            if target.name in wanted
        }
        for (target, key, file), evaluation, measurement in zip(quantized, evaluations, measured, strict=True):
            self.packages[target.name] = self._package(
                target,
                key,
                file,
                evaluation,
                measurement,
                scores,
                student_scores,
                teacher_gguf,
                drafts.get(target.name),
                cache=caches[target.name][1],
            )

    def _ship_link(self, number: int, link: Inputs, student: Key, teacher: Key, kept: Key, scores: Key) -> None:
        """Add what an intermediate student needs to ship for targets of its own: the steps that the last one has, named after the
        link (``quantize/laptop-x86@link-1``), held against the same teacher.
        """
        whole, of = (self.inputs, self.recipe, self.s_params), f"link-{number}"
        self.inputs, self.recipe, self.s_params = link, link.recipe, student_facts(link).params()
        title, student = f"student of link {number}", self._temper(student, step_of("temper", of))
        teacher_gguf = self._convert("convert/teacher", teacher, link.teacher, self.t_params)
        gguf = self._convert(step_of("convert/student", of), student, link.student, self.s_params, title=title)
        imatrix = self._calibrate(step_of("calibrate", of), gguf, kept, self.s_params)
        scored = self._evaluate(step_of("evaluate/student", of), gguf, "model.gguf", self.s_params)
        self._measure(step_of("measure/student", of), gguf, "model.gguf", None, None)
        for target in link.targets:
            name = step_of(target.name, of)
            key, file = self._typed(name, target, student, gguf, imatrix, kept, of)
            kv, cache = self._kv_cache(name, target, key, imatrix)
            references = {"student": gguf, "teacher": teacher_gguf}
            evaluation = self._evaluate(
                f"evaluate/{name}", key, file, self.s_params, references=references, grammar=file != "onnx", kv=kv
            )
            speed = self._measure(f"measure/{name}", key, file, teacher_gguf, target, kv)
            self.packages[name] = self._package(
                target, key, file, evaluation, speed, scores, scored, teacher_gguf, cache=cache, of=of
            )
        self.inputs, self.recipe, self.s_params = whole

    def _draft(self, target: Target, shipped: Key, student: Key, kv: Pair | Key) -> tuple[Key, Key]:
        """Add the draft of one target; return the keys of its file and of what it brings."""
        assert self.recipe.draft is not None
        trained, params = self._train_draft(target, shipped, student)
        gguf = self._convert(f"convert/draft-{target.name}", trained, self.inputs.student, params)
        types = Types(type=self.recipe.draft.type)
        file = self._quantize(f"quantize/draft-{target.name}", gguf, None, "gguf", types, params)
        return file, self._speculate(target, shipped, file, kv)

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
        only: Collection[str] | None = None,
        server: Server | None = None,
        kv: Pair | Key = F16,
    ) -> Key:
        thinks = self.recipe.generate.style in BLOCKS
        suites = {name: rows for name, rows in self.inputs.suites.items() if only is None or name in only}
        specs = tuple(
            SuiteSpec(
                name=suite,
                digest=rows_digest(rows),
                metric=AFTER_THINKING + metric if thinks and metric != "perplexity" else metric,
                max_new_tokens=spec.max_new_tokens,
                grammar=self._grammar(spec) if grammar else None,
            )
            for suite, rows in suites.items()
            for spec in [self.recipe.suites[suite]]
            for metric in [keyed_metric(self.inputs, spec.metric, f"suites.{suite}.metric")]
        )
        kind = kind or ("decode-onnx" if file == "onnx" else "decode-gguf")
        tokens = sum(sum(map(row_tokens, rows)) for rows in suites.values())
        tokens += sum(sum(map(row_tokens, suites[spec.name])) for spec in specs if spec.grammar)
        served, server = kind == "served", server or self.server
        manner = server.manner if server else ""
        stage = Evaluate(
            model=model,
            file=file,
            suites=specs,
            shots=few_shots(self.inputs.gold, shots),
            references=dict(references or {}),
            build={"decode": "transformers", "decode-onnx": self.onnx, "served": f"openai {manner}".strip()}.get(
                kind, self.llama
            ),
            isa="" if served else self.isa,
            labels=self._labels(specs),
            kv=kv,
            rows=suites,
            server=server if served else None,
            folder=self.inputs.path.parent,
            **(self._calls(itertools.chain.from_iterable(suites.values())) if served else {}),
        )
        return self.graph.add(
            name,
            stage,
            Work(kind=kind, amount=tokens if served else 2 * params * tokens),
            memory=4 * params + bool(references) * 2 * (self.t_params + self.s_params) + RUNTIME_MIB * MIB,
            disk=sum(len(rows) for rows in suites.values()) * 400,
        )

    def _labels(self, suites: Iterable[SuiteSpec]) -> tuple[str, ...]:
        """Return the labels, where one of the suites is scored by them."""
        labels = self.recipe.labels
        return labels.names if labels and any(suite.metric == LABEL for suite in suites) else ()

    def _grammar(self, suite: Suite) -> str | None:
        if suite.grammar is None:
            return None
        path = self.inputs.path.parent / suite.grammar
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            name = next(name for name, one in self.recipe.suites.items() if one is suite)
            why = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
            raise RecipeError(
                f"{path}: {why}",
                "write the GBNF grammar there, or leave the key out",
                file=self.inputs.path,
                key=f"suites.{name}.grammar",
            ) from None

    def _measure(
        self, name: str, model: Key, file: str, baseline: Key | None, target: Target | None, kv: Pair | Key = F16
    ) -> Key:
        prompts = next(
            (rows[:24] for s, rows in self.inputs.suites.items() if self.recipe.suites[s].metric != "perplexity"), ()
        )
        prompts = prompts or self.inputs.prompts[:24]
        cores = self.host.cores  # two threads of one core slow each other: such speeds are noisy
        stage = Measure(
            model=model,
            file=file,
            baseline=baseline,
            threads=min(target.runtime.threads, cores) if target else cores,
            context=target.runtime.context if target else 2048,
            device=self.host.digest,
            build=self.onnx if file == "onnx" else self.llama,
            prompts_digest=rows_digest(prompts),
            kv=kv,
            prompts=tuple(prompts),
        )
        # Both lie in memory at once, each with a context.
        memory = self._weighs(model) + (self._weighs(baseline) if baseline else 0) + 600 * MIB
        return self.graph.add(name, stage, Work(kind="measure", amount=15 * MEASURE_SECONDS), memory=memory)

    def _weighs(self, artifact: Key) -> int:
        """Estimate the bytes of an artifact."""
        from edgedistill.formats.gguf.types import file_type

        step = self.graph.step(artifact)
        if isinstance(step.stage, Tune):
            return self._weighs(step.stage.quantized)
        if isinstance(step.stage, Gguf):
            return self.inputs.teacher.facts.size
        if not isinstance(step.stage, Quantize):  # an f16 file
            return step.disk
        if step.stage.types is not None:
            choice = self.graph.step(step.stage.types).stage
            assert isinstance(choice, Allocate)
            return choice.size
        # The disk is of two bytes a weight; of an ONNX folder, whose embeddings are not packed, of four.
        return step.disk // 2 if step.stage.format == "onnx" else int(step.disk * file_type(step.stage.type).bpw / 16)

    def _package(
        self,
        target: Target,
        key: Key,
        file: str,
        evaluation: Key,
        measurement: Key,
        scores: Key,
        student: Key,
        reference: Key | None,
        draft: tuple[Key, Key] | None = None,
        *,
        cache: Key | None = None,
        of: str = "",
    ) -> Key:
        """Add the package of one target; ``of`` names the link of the chain that ships, "" for the last student."""
        gates = self.recipe.gates.keyed()
        for name in ("min_speedup", "min_shrink", "max_kv_kld"):
            if isinstance(gates.get(name), dict):
                gates[name] = gates[name].get(target.name)
        same, why = matches_host(target, self.host)
        grammars = (self._grammar(suite) for suite in self.recipe.suites.values() if file != "onnx")
        grammar = next((text for text in grammars if text), None)
        tokens = [s.max_new_tokens for s in self.recipe.suites.values() if s.metric != "perplexity"]
        fields: dict[str, Any] = {
            "model": key,
            "file": file,
            "evaluation": evaluation,
            "measurement": measurement,
            "teacher": scores,
            "student": student,
            "reference": reference,
            "recipe": step_of(self.recipe.name, of) if of else self.recipe.name,
            "target": {"name": target.name, **target.to_json()},
            "unproved": "" if same else why,
            "gates": gates,
            "sources": tuple(sources(self.inputs)),
            "generation": {
                "temperature": 0.0,
                "max_new_tokens": max(tokens, default=64),
                "context": target.runtime.context,
            },
            "grammar": grammar,
            "ship_anyway": self.inputs.ship_anyway,
            "upstream": {},
            "example": tuple(self.inputs.prompts[0].messages),
            "kv_cache": cache,
        }
        stage: Package = DraftedPackage(**fields, draft=draft[0], drafting=draft[1]) if draft else Package(**fields)
        name = step_of(target.name, of) if of else target.name
        stage = replace(stage, upstream=self._upstream(stage, name))
        return self.graph.add(f"package/{name}", stage, Work(kind="bytes", amount=2.0 * self.s_params))

    def _upstream(self, stage: Package, name: str) -> dict[str, str]:
        """Return the keys of all that a package is made of. A step that targets share goes by the name that it has for this one:
        the manifest says the same whatever else is built beside it.
        """

        def foreign(step: str) -> int:
            of = step.partition("/")[2].removeprefix("draft-")
            return 0 if of == name else 2 if of.partition("@")[0] in self.every_target else 1

        steps = self.graph.upstream(stage.inputs())
        return {min(step.ids, key=foreign): str(step.key) for step in steps}
