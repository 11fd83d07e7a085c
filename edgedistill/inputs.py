"""Everything that a plan is made of, read from disk, and all that can be refused before anything runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Row, leaks, load_rows
from edgedistill.data.thinking import BLOCKS, asking_why, split, two_tasks, with_block
from edgedistill.errors import RecipeError, UsageError
from edgedistill.families import of_any_width
from edgedistill.models import ModelFacts, Resolved
from edgedistill.plan import package_version
from edgedistill.recipe import Adapt, Heal, Prompts, Recipe, Student, Tune
from edgedistill.target import Target, format_size
from edgedistill.training.shaping import choose_layers

NARROWABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "smollm3")
"""Architectures whose FFN ``student.ffn`` makes narrower, as GGUF and as config.json name them."""
ROTATABLE = ("llama", "mistral")
"""Architectures whose residual stream ``student.hidden`` makes narrower: RMS norms without offsets, before each half alone.
(llama.cpp reads a Qwen 2 only where its heads are together as wide as the stream.)
"""
GAP = 4.0  # times fewer parameters than the teacher that one step of distillation mostly recovers
TOKENS_A_WORD = 1.4  # English prose, in the tokenizers of small models
BLOCK = 32  # weights in a block of the smallest block types; a row must be a multiple


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
    healing: tuple[Row, ...]
    tuning: tuple[Row, ...]
    suites: Mapping[str, tuple[Row, ...]]
    ship_anyway: bool = False


class _Files:
    """JSONL files beside a recipe, each parsed once however many keys name it."""

    def __init__(self, recipe_path: Path) -> None:
        self.recipe_path = recipe_path
        self._read: dict[tuple[Path, bool], list[Row]] = {}

    def rows(self, file: Path, key: str, *, reference: bool) -> list[Row]:
        path = self.recipe_path.parent / file
        if (path, reference) not in self._read:
            if not path.is_file():
                raise RecipeError(f"{path}: no such file", f"create it, or mend {key}", file=self.recipe_path, key=key)
            self._read[path, reference] = load_rows(path, need_reference=reference)
        return self._read[path, reference]


def _read_rows(
    source: _Files,
    files: Sequence[Path],
    limit: int | Sequence[int] | None,
    key: str,
    *,
    reference: bool,
    skip: int | Sequence[int] = 0,
) -> tuple[Row, ...]:
    """Read the rows of several JSONL files, the first ``limit`` of each after ``skip`` (one count for all files, or one for
    each); the key is named in errors.
    """
    rows: list[Row] = []
    limits = limit if isinstance(limit, Sequence) else [limit] * len(files)
    skips = skip if isinstance(skip, Sequence) else [skip] * len(files)
    for file, most, first in zip(files, limits, skips, strict=True):
        found = source.rows(file, key, reference=reference)
        if first >= len(found):
            name = f"{key.partition('.')[0]}.skip"
            raise RecipeError(
                f"{name} leaves out {first} rows, and {file} has {len(found)}",
                "skip fewer",
                file=source.recipe_path,
                key=name,
            )
        rows += found[first:][:most]
    doubled = [name for name, group in itertools.groupby(sorted(row.id for row in rows)) if len(list(group)) > 1]
    if doubled:
        raise RecipeError(f"two rows have the id {doubled[0]!r}", "make ids unique", file=source.recipe_path, key=key)
    return tuple(rows)


def read_inputs(
    recipe: Recipe,
    path: Path,
    teacher: Resolved,
    student: Resolved,
    targets: Iterable[Target],
    *,
    ship_anyway: bool = False,
) -> Inputs:
    """Read the data files of a recipe."""
    source, style = _Files(path), recipe.generate.style
    need = any(f.kind == "reference" for f in recipe.filter) or recipe.baselines.gold_sft

    def read(
        section: Prompts | Adapt | Heal | Tune | None, name: str, *, reference: bool = True, skip: Any = 0
    ) -> tuple[Row, ...]:
        if section is None:
            return ()
        rows = _read_rows(source, section.files, section.rows, f"{name}.files", reference=reference, skip=skip)
        if style == "rationale" and name in ("heal", "tune"):  # of a student that answers at once
            return two_tasks(rows)
        return with_block(rows, style)

    return Inputs(
        recipe=recipe,
        path=path,
        teacher=teacher,
        student=student,
        targets=tuple(targets),
        prompts=read(recipe.prompts, "prompts", reference=need),
        gold=read(recipe.adapt, "adapt"),
        healing=read(recipe.heal, "heal"),
        tuning=read(recipe.tune, "tune", skip=recipe.tune.skip if recipe.tune else 0),
        suites={
            name: with_block(
                _read_rows(source, suite.files, None, f"suites.{name}.files", reference=True),
                "answer" if style == "rationale" else style,
            )
            for name, suite in recipe.suites.items()
        },
        ship_anyway=ship_anyway,
    )


def refuse(inputs: Inputs) -> list[str]:
    """Raise RecipeError or UsageError for what cannot work; return warnings for what works but deserves a word."""
    from edgedistill.training.lora import check_targets

    recipe, warnings = inputs.recipe, []
    teacher, student = inputs.teacher.facts, inputs.student.facts
    if recipe.score.kind != "none" and recipe.distill.loss.kd > 0 and teacher.tokenizer != student.tokenizer:
        raise RecipeError(
            f"{recipe.teacher.model} and {recipe.student.model} have different tokenizers: "
            "their distributions cannot be compared",
            'set score.kind = "none" and distill.loss.kd = 0 to distil text only',
            key="score.kind",
            file=inputs.path,
        )
    if teacher.quantized_from:
        warnings.append(
            f"the teacher's weights come from {teacher.quantized_from}: its distributions are those of a "
            "quantized model "
            "(dequantized to full precision)"
        )
    warnings += _gaps(along_chain(inputs, _refuse_shape))
    if recipe.student.layers != "all" and recipe.heal is None and recipe.distill.method == "lora":
        warnings.append("a pruned student is distilled by LoRA without [heal]: expect it to learn slowly")
    if recipe.heal and recipe.heal.hidden and (teacher.layers, teacher.hidden) != (student.layers, student.hidden):
        raise RecipeError(
            f"heal.hidden compares layers, and {recipe.student.model} has {student.layers} of width {student.hidden}, "
            f"{recipe.teacher.model} {teacher.layers} of width {teacher.hidden}",
            'cut the student out of the teacher (student.model = "teacher"), or set heal.hidden = 0',
            key="heal.hidden",
            file=inputs.path,
        )
    for key, section, facts in (("adapt", recipe.adapt, teacher), ("distill", recipe.distill, student)):
        if section is not None and section.method != "full":
            try:
                check_targets(facts.config(), section.lora.targets)
            except UsageError as error:
                raise RecipeError(error.message, error.hint, key=f"{key}.lora.targets", file=inputs.path) from None
    if recipe.distill.method == "qlora" and not Path("/dev/nvidiactl").exists():
        raise RecipeError(
            "QLoRA needs a CUDA device, and this machine has none",
            'set method = "lora"',
            key="distill.method",
            file=inputs.path,
        )
    taught = {id(row): row for row in (*inputs.prompts, *inputs.gold, *inputs.healing, *inputs.tuning)}  # shared
    for found in leaks(list(taught.values()), inputs.suites)[:1]:
        raise RecipeError(
            f"the prompt {found.prompt[:60]!r} stands in the training rows and in a suite",
            "remove it from one of the files: a score on seen prompts proves nothing",
            key="suites",
            file=inputs.path,
        )
    for target in inputs.targets:
        warnings += _refuse_target(inputs, target)
    return warnings + _refuse_tuning(inputs) + _thinking(inputs)


def _thinking(inputs: Inputs) -> list[str]:
    """Warn where a style that thinks finds no thoughts to learn from, or a device too slow for them."""
    recipe, found = inputs.recipe, []
    style = recipe.generate.style
    if style not in BLOCKS:
        return []
    if recipe.adapt and not any(split(row.reference or "").thinking for row in inputs.gold):
        found.append(
            f'generate.style = "{style}", and no row of adapt.files has a "rationale": the teacher learns to answer at once'
        )
    for name, suite in recipe.suites.items():
        if suite.grammar is not None and style != "rationale":
            found.append(f"suites.{name}.grammar must allow the block {BLOCKS[style][0]}…{BLOCKS[style][1]}")
    budget = next((one.max_words for one in recipe.filter if one.kind == "thinking" and one.max_words), None)
    for target in inputs.targets:
        if style == "rationale" or target.limits.tg128 is None:
            continue
        if budget is None:
            found.append(
                f"{target.name} may write as slowly as {target.limits.tg128:g} tokens/s, and nothing bounds the thinking "
                "before an answer: add [[filter]] kind = 'thinking' with max_words"
            )
        else:
            seconds = budget * TOKENS_A_WORD / target.limits.tg128
            found.append(
                f"{target.name}: {budget} words of thinking take {seconds:.0f} s before the answer at its "
                f"{target.limits.tg128:g} tokens/s (filter.max_words)"
            )
    return found


def _refuse_tuning(inputs: Inputs) -> list[str]:
    """Refuse to tune the norms of what cannot be dequantized; warn where the text was taught already."""
    tune = inputs.recipe.tune
    if tune is None:
        return []
    told: tuple[str, str] | None = None
    for target in inputs.targets:
        if target.name in tune.targets and target.runtime.format != "gguf":
            told = (f"{target.name} is an ONNX target: norms are tuned in GGUF files", "take it out of tune.targets")
    if inputs.student.facts.architecture != "llama":
        family = inputs.student.facts.architecture
        told = (f"norms are tuned in files of the llama family, and the student is {family}", "leave [tune] out")
    if told is not None:
        raise RecipeError(*told, key="tune.targets", file=inputs.path)
    taught = {row.id for row in (*inputs.prompts, *inputs.gold, *inputs.healing)}
    seen = sum(row.id in taught for row in inputs.tuning)
    if not seen:
        return []
    return [
        f"{seen} of {len(inputs.tuning)} rows of [tune] are taught before: what rounding did shows little on them (tune.skip)"
    ]


def _refuse_shape(inputs: Inputs, section: str) -> None:
    """Refuse layers, neurons and tokens that the model which is cut does not have; ``section`` is named in errors."""
    student, facts = inputs.recipe.student, inputs.student.facts
    layers = student.layers
    if (isinstance(layers, int) and layers > facts.layers) or (
        isinstance(layers, tuple) and max(layers) >= facts.layers
    ):
        whole = student.model if section == "student" else "the model before this link"
        raise RecipeError(
            f"{whole} has {facts.layers} layers", "keep fewer of them", key=f"{section}.layers", file=inputs.path
        )
    if student.layers_by == "importance" and not (inputs.healing or inputs.gold):
        raise RecipeError(
            "no rows tell which layers the task needs",
            "give heal.files or adapt.files",
            key=f"{section}.layers_by",
            file=inputs.path,
        )
    if student.hidden is not None:
        _refuse_hidden(inputs, student.hidden, f"{section}.hidden")
    if student.ffn is not None:
        _refuse_width(inputs, student.ffn, f"{section}.ffn")
    if student.vocabulary is not None:
        _refuse_vocabulary(inputs, student.vocabulary, f"{section}.vocabulary")


def _gaps(links: Sequence[Inputs]) -> list[str]:
    """Warn of a gap in size that is wider than what one step of distillation usually recovers."""
    found = []
    for number, link in enumerate(links, 1):
        before, after = link.student.facts.params(), student_facts(link).params()
        gap = before / after
        if link.recipe.student.model == "teacher" and gap > GAP:
            middle = round((before * after) ** 0.5 / 1e6)
            what = "the student" if number == len(links) else f"link {number} of the chain"
            found.append(
                f"{what} has 1/{gap:.1f} of the parameters of what teaches it: beyond 1/{GAP:g} much is lost; a [[chain]] link of "
                f"about {middle} million parameters would part it in two equal ones"
            )
    return found


def _refuse_hidden(inputs: Inputs, width: int, key: str) -> None:
    """Refuse a hidden size that the model does not have, that no block type divides, or that no row can tell."""
    model, facts = inputs.recipe.student.model, inputs.student.facts
    told: tuple[str, str] | None = None
    if facts.architecture not in ROTATABLE:
        told = (
            f"the residual stream of {model} ({facts.architecture}) cannot be made narrower: only that of a Llama or Mistral can",
            f"leave {key} out, and set layers or ffn instead",
        )
    elif width > facts.hidden:
        told = (f"the hidden size of {model} is {facts.hidden}", f"take less, or leave {key} out")
    elif width % BLOCK:
        lower = max(BLOCK, width // BLOCK * BLOCK)
        told = (
            f"{width} is no multiple of {BLOCK}: the types of llama.cpp and ONNX pack {BLOCK} weights in a block",
            f"take {lower} or {lower + BLOCK}; k-quants need a multiple of 256",
        )
    elif not (inputs.healing or inputs.gold):
        told = ("no rows tell which directions the task needs", "give heal.files or adapt.files")
    elif inputs.student.path.is_dir():  # of a GGUF, the shape step tells
        try:
            of_any_width({**json.loads((inputs.student.path / "config.json").read_text()), "hidden_size": width})
        except UsageError as error:
            told = (error.message, error.hint)
    if told:
        raise RecipeError(*told, key=key, file=inputs.path)


def _refuse_width(inputs: Inputs, width: int, key: str) -> None:
    """Refuse a width of the FFN that the model does not have, that no block type divides, or that no row can tell."""
    model, facts = inputs.recipe.student.model, inputs.student.facts
    told: tuple[str, str] | None = None
    if facts.architecture not in NARROWABLE:
        told = (f"the FFN of {model} ({facts.architecture}) cannot be made narrower", "set student.layers instead")
    elif width > facts.ffn:
        told = (f"the FFN of {model} has {facts.ffn} neurons", f"take fewer of them, or leave {key} out")
    elif width % BLOCK:
        lower = max(BLOCK, width // BLOCK * BLOCK)
        told = (
            f"{width} is no multiple of {BLOCK}: the types of llama.cpp and ONNX pack {BLOCK} weights in a block",
            f"take {lower} or {lower + BLOCK}",
        )
    elif not (inputs.healing or inputs.gold):
        told = ("no rows tell which neurons the task needs", "give heal.files or adapt.files")
    if told:
        raise RecipeError(*told, key=key, file=inputs.path)


def _refuse_vocabulary(inputs: Inputs, size: int, key: str) -> None:
    """Refuse a vocabulary larger than the model's, or of a tokenizer that cannot spell what was cut away."""
    from edgedistill.training.vocabulary import check_trimmable

    model, facts = inputs.recipe.student.model, inputs.student.facts
    if size > facts.vocab:
        raise RecipeError(
            f"the vocabulary of {model} has {facts.vocab} tokens",
            f"take fewer of them, or leave {key} out",
            key=key,
            file=inputs.path,
        )
    if (
        inputs.student.path.is_dir()
    ):  # a GGUF that `base` dequantizes has a byte-level BPE tokenizer, or is refused there
        try:
            check_trimmable(inputs.student.path)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, key=key, file=inputs.path) from None


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
    facts = student_facts(inputs)
    config = facts.config()
    wanted = target.quantize.type
    options = {"embedding_type": target.quantize.embedding_type, "output_type": target.quantize.output_type}
    size = estimate_file_size(config, None, wanted, imatrix=target.quantize.imatrix, **options)
    if limit is not None:
        best, least = smallest_type(config)
        if least > limit:
            raise RecipeError(
                f"no type brings this student under {format_size(limit)}: "
                f"the smallest, {best}, makes about {format_size(least)}",
                "take fewer layers or a smaller student, or raise the limit",
                file=target.path,
                key="limits.file_size",
            )
        if size > limit:
            warnings.append(
                f"{target.name}: {wanted} makes about {format_size(size)}, over its file_size of {format_size(limit)}"
            )
    base, hidden = file_type(wanted).base, facts.hidden
    odd = [n for n in sorted({hidden, facts.heads * facts.head, facts.ffn}) if fits(base, n) != base]
    if odd:
        told = (
            f"; hidden = {hidden // 256 * 256 or 256} would not"
            if inputs.recipe.student.hidden and hidden in odd
            else ""
        )
        warnings.append(
            f"{target.name}: {', '.join(map(str, odd))} columns are no multiple of 256, so "
            f"{'much' if hidden in odd else 'a part'} of {wanted} falls back to larger types (quantize says which): "
            f"about {format_size(size)}{told}"
        )
    return warnings


def along_chain(
    inputs: Inputs, check: Callable[[Inputs, str], None] = lambda link, section: None
) -> tuple[Inputs, ...]:
    """Return the inputs of every link of the chain and of the last student, each as if the model before it were its teacher, and
    what it is cut out of. Without a chain: the inputs themselves. ``check`` sees each, and the table of the recipe that it stands
    in, before the next is made from it.
    """
    if not inputs.recipe.chain:
        check(inputs, "student")
        return (inputs,)
    found: list[Inputs] = []
    facts = inputs.student.facts
    shapes = [Student(model="teacher", **link.model_dump()) for link in inputs.recipe.chain]
    for student in (*shapes, inputs.recipe.student):
        one = replace(
            inputs,
            recipe=inputs.recipe.model_copy(update={"student": student, "chain": ()}),
            teacher=replace(inputs.teacher, facts=facts),
            student=replace(inputs.student, facts=facts),
        )
        check(one, f"chain.{len(found)}" if len(found) < len(shapes) else "student")
        found.append(one)
        facts = student_facts(one)
    return tuple(found)


def student_facts(inputs: Inputs) -> ModelFacts:
    """Return the facts of the student after shaping."""
    inputs = along_chain(inputs)[-1]
    student, facts = inputs.recipe.student, inputs.student.facts
    return replace(
        facts,
        layers=len(chosen_layers(inputs)),
        hidden=student.hidden or facts.hidden,
        head_dim=facts.head,
        ffn=student.ffn or facts.ffn,
        vocab=student.vocabulary or facts.vocab,
    )


def taught_rows(inputs: Inputs) -> tuple[Row, ...]:
    """Return all rows that teach teacher or student, each once: their tokens stay in a trimmed vocabulary."""
    if inputs.recipe.student.vocabulary is None:
        return ()
    rows = list({id(row): row for row in (*inputs.healing, *inputs.gold, *inputs.prompts)}.values())
    if inputs.recipe.generate.style == "rationale":  # the request for one is text that the student reads
        first = inputs.prompts[0]
        rows.append(replace(first, id=f"{first.id}+why", messages=tuple(asking_why(first.messages))))
    return tuple(rows)


def cut_rows(inputs: Inputs) -> tuple[Row, ...]:
    """Return the rows that tell which neurons, directions and layers the student needs: evenly spaced ones of those that heal it,
    else of those that the teacher is adapted on.
    """
    student = inputs.recipe.student
    if student.ffn is None and student.hidden is None and student.layers_by != "importance":
        return ()
    rows = inputs.healing or inputs.gold
    count = min(inputs.recipe.student.ffn_rows, len(rows))
    return tuple(rows[at * len(rows) // count] for at in range(count))


def chosen_layers(inputs: Inputs) -> tuple[int, ...]:
    """Return which layers of its model the student keeps."""
    layers = inputs.recipe.student.layers
    total = inputs.student.facts.layers
    return tuple(choose_layers(total, total if layers == "all" else layers))


def few_shots(gold: tuple[Row, ...], count: int) -> tuple[dict[str, str], ...]:
    """Choose training examples for the few-shot prompt: the first of each tag, in the order of the file."""
    if not count:
        return ()
    seen: dict[str, Row] = {}
    for row in gold:
        seen.setdefault(row.tags[0] if row.tags else row.id, row)
    return tuple(
        {"prompt": str(row.messages[-1]["content"]), "reference": row.reference or ""}
        for row in list(seen.values())[:count]
    )
