"""What can be refused before anything runs, and what is worth a warning: each by file, line and key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgedistill.chat import check_tools
from edgedistill.data.prompts import leaks
from edgedistill.data.sandbox import find_engine
from edgedistill.data.thinking import AFTER, BLOCKS, split
from edgedistill.errors import RecipeError, UsageError
from edgedistill.evals import reasoning
from edgedistill.families import of_any_width
from edgedistill.inputs import (
    TRACES,
    Inputs,
    all_targets,
    along_chain,
    draft_inputs,
    files_of_rows,
    placed,
    read_reviews,
    student_facts,
)
from edgedistill.kv_cache import F16
from edgedistill.pairing import check_features, tokens_differ
from edgedistill.plan import package_version
from edgedistill.refusals_auto import refuse_auto, refuse_onnx, refuse_size
from edgedistill.refusals_chat import refuse_templates
from edgedistill.refusals_filter import refuse_graders, refuse_languages, refuse_metrics, warn_of_labels
from edgedistill.refusals_kv import refuse_kv
from edgedistill.refusals_length import refuse_long
from edgedistill.refusals_prompts import refuse_prompts
from edgedistill.refusals_teachers import refuse_backend, refuse_others
from edgedistill.refusals_tune import refuse_tuning
from edgedistill.target import AUTO, Target, format_size
from edgedistill.training.objectives import WHOLE

NARROWABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "smollm3")
"""Architectures whose FFN ``student.ffn`` makes narrower, as GGUF and as config.json name them."""
ROTATABLE = ("llama", "mistral")
"""Architectures whose residual stream ``student.hidden`` makes narrower: RMS norms without offsets, before each half alone.
(llama.cpp reads a Qwen 2 only where its heads are together as wide as the stream.)
"""
GYM = "reasoning-gym"
GAP = 4.0  # times fewer parameters than the teacher that one step of distillation mostly recovers
TOKENS_A_WORD = 1.4  # English prose, in the tokenizers of small models
BLOCK = 32  # weights in a block of the smallest block types; a row must be a multiple


def refuse(inputs: Inputs) -> list[str]:
    """Raise RecipeError or UsageError for what cannot work; return warnings for what works but deserves a word."""
    from edgedistill.training.lora import check_modules, check_targets

    recipe, warnings = inputs.recipe, refuse_templates(inputs)
    teacher, student = inputs.teacher.facts, inputs.student.facts
    differ = tokens_differ(inputs.teacher, inputs.student, inputs.prompts)
    if differ and recipe.distill.loss.kd > 0 and recipe.distill.loss.divergence not in WHOLE:
        raise RecipeError(
            f"{recipe.teacher.model} and {recipe.student.model} {differ}: their distributions cannot be compared token by token",
            'compare them by rank (score.kind = "dense", distill.loss.divergence = "uld" or "gold"), or distil text only '
            '(score.kind = "none", distill.loss.kd = 0)',
            key="score.kind",
            file=inputs.path,
        )
    if differ and recipe.heal and recipe.heal.hidden:
        raise RecipeError(
            f"{recipe.teacher.model} and {recipe.student.model} {differ}: their hidden states stand at other places of the text",
            "set heal.hidden = 0",
            key="heal.hidden",
            file=inputs.path,
        )
    if teacher.quantized_from:
        how = "as its file is" if recipe.teacher.backend == "llama_cpp" else "dequantized to full precision"
        warnings.append(
            f"the teacher's weights come from {teacher.quantized_from}: its distributions are those of a quantized model ({how})"
        )
    refuse_backend(inputs)
    refuse_others(inputs)
    links = along_chain(inputs, _refuse_shape)
    warnings += _gaps(links)
    warnings += check_features(
        recipe, inputs.path, [(link.teacher.facts, student_facts(link)) for link in links], differ
    )
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
                check_modules(facts.architecture, section.lora.targets)
            except UsageError as error:
                raise RecipeError(error.message, error.hint, key=f"{key}.lora.targets", file=inputs.path) from None
    if recipe.distill.method == "qlora" and not Path("/dev/nvidiactl").exists():
        raise RecipeError(
            "QLoRA needs a CUDA device, and this machine has none",
            'set method = "lora"',
            key="distill.method",
            file=inputs.path,
        )
    every = (
        *inputs.prompts,
        *inputs.gold,
        *inputs.healing,
        *inputs.tuning,
        *inputs.drafting,
        *inputs.tempering,
        *inputs.general,
        *inputs.tuning_general,
    )
    taught = {id(row): row for row in every}  # files may be shared
    for found in leaks(list(taught.values()), inputs.suites)[:1]:
        one, other = (
            "the training rows" if name == "train" else f"the suite {name!r}" for name, _ in (found.first, found.second)
        )
        raise RecipeError(
            f"the prompt {found.prompt[:60]!r} stands in {one} and in {other}",
            "remove it from one of the files: a score on seen prompts proves nothing",
            key="suites",
            file=inputs.path,
        )
    warnings += _refuse_tools(inputs) + refuse_prompts(inputs) + refuse_long(inputs)
    _refuse_problems(inputs)
    _refuse_execution(inputs)
    refuse_metrics(inputs)
    refuse_languages(inputs)
    refuse_graders(inputs)
    for number, link in enumerate(links, 1):
        who = "this student" if number == len(links) else f"link {number} of the chain"
        warnings += [found for target in link.targets for found in _refuse_target(link, target, who)]
    if recipe.gates.max_kv_kld is not None and all(target.kv == F16 for target in all_targets(inputs)):
        warnings.append(
            "gates.max_kv_kld: no target has a runtime.kv_cache other than f16, so there is nothing to measure"
        )
    if recipe.calibrate.general and all(target.runtime.format != "gguf" for target in all_targets(inputs)):
        warnings.append("calibrate.general: it is for GGUF targets, and the recipe has none")
    _refuse_order(inputs)
    _refuse_baselines(inputs)
    _refuse_draft(inputs)
    _refuse_temperature(inputs)
    return warnings + refuse_tuning(inputs) + _thinking(inputs) + _reviews(inputs) + warn_of_labels(inputs)


def _reviews(inputs: Inputs) -> list[str]:
    """Warn of verdicts on rows that are gone; refuse files of verdicts that cannot be read."""
    known, found = {row.id for row in inputs.prompts}, []
    for file, verdicts in read_reviews(inputs).items():
        if gone := sum(one.id not in known for one in verdicts.values()):
            found.append(f"{file}: {gone} of {len(verdicts)} verdicts are on rows that the prompts no longer have")
    return found


def _refuse_tools(inputs: Inputs) -> list[str]:
    """Refuse tools and results that a chat template does not print; warn where there are no traces to learn from."""
    check_tools((inputs.teacher, inputs.student), files_of_rows(inputs), inputs.path)
    found = []
    if any(row.tools for row in inputs.prompts):
        found.append("rows have tools: time to first token is measured without their definitions in the prompt")
    if inputs.recipe.generate.style == TRACES and len({row.trace for row in inputs.prompts}) == len(inputs.prompts):
        found.append(
            'generate.style = "tool-trace", and every row of prompts.files is one turn: "answer" does the same'
        )
    return found


def _refuse_problems(inputs: Inputs) -> None:
    """Refuse the metric "reasoning-gym" without the library, and rows that its verifiers cannot judge."""
    recipe = inputs.recipe
    judged = {
        f"suites.{name}.metric": (f"suites.{name}.files", inputs.suites[name])
        for name, suite in recipe.suites.items()
        if suite.metric == GYM
    }
    judged |= {
        f"filter.{at}.metric": ("prompts.files", inputs.prompts)
        for at, one in enumerate(recipe.filter)
        if one.metric == GYM
    }
    for key, (files, rows) in judged.items():
        if not reasoning.installed():
            raise RecipeError("reasoning-gym is not installed", reasoning.INSTALL, key=key, file=inputs.path)
        for row in rows:
            try:
                reasoning.check_entry(row.reasoning_gym)
            except UsageError as error:
                where = placed(inputs, files, row)
                raise RecipeError(f"{where}: {error.message}", error.hint, key=key, file=inputs.path) from None


def _refuse_execution(inputs: Inputs) -> None:
    """Refuse to run answers' code where no sandbox works, and where a row's tests are of no one answer."""
    recipe = inputs.recipe
    keys = [f"suites.{name}.metric" for name, suite in recipe.suites.items() if suite.metric == "execution"]
    keys += [f"filter.{at}.kind" for at, one in enumerate(recipe.filter) if one.kind == "execution"]
    if keys:
        if recipe.generate.style == TRACES:
            told = ("tests are of one answer, and a trace has several", 'set generate.style = "answer", or "think"')
            raise RecipeError(*told, key=keys[0], file=inputs.path)
        try:
            find_engine()
        except UsageError as error:
            raise RecipeError(error.message, error.hint, key=keys[0], file=inputs.path) from None


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
    for target in all_targets(inputs):
        if style == "rationale" or style in AFTER or target.limits.tg128 is None:
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


def _refuse_temperature(inputs: Inputs) -> None:
    """Refuse models whose final norm may not scale the logits, and rows that were taught: there a student is rightly sure."""
    if inputs.recipe.temperature is None:
        return
    told: tuple[str, str] | None = None
    taught = {row.id for row in (*inputs.prompts, *inputs.gold, *inputs.healing)}
    family = inputs.student.facts.architecture
    if family not in NARROWABLE:
        told = (f"a temperature cannot be folded into the final norm of {family}", "leave [temperature] out")
    elif seen := sum(row.id in taught for row in inputs.tempering):
        told = (
            f"{seen} of {len(inputs.tempering)} rows of [temperature] are taught before: of these the student is rightly sure",
            "leave them out with temperature.skip, or take other files",
        )
    if told is not None:
        raise RecipeError(*told, key="temperature.files", file=inputs.path)


def _refuse_order(inputs: Inputs) -> None:
    """Refuse an order by rounds of evolution where no row tells its own."""
    heal = inputs.recipe.heal
    tables = [("distill", inputs.recipe.distill.curriculum, "prompts.files")]
    tables += [("heal", heal.curriculum, "heal.files" if inputs.healing else "prompts.files")] if heal else []
    for table, order, files in tables:
        rows = inputs.healing if files == "heal.files" else inputs.prompts
        evolves = rows is inputs.prompts and any(one.kind == "evol-instruct" for one in inputs.recipe.prompts.augment)
        if order == "evolution" and not evolves and not any(row.evolution for row in rows):
            raise RecipeError(
                f'no row of {files} has an "evolution" above 0: all would be equally hard',
                'give evolved rows their round ("evolution": 1), augment by "evol-instruct", or order them by "length" or "loss"',
                key=f"{table}.curriculum",
                file=inputs.path,
            )


def _refuse_baselines(inputs: Inputs) -> None:
    """Refuse a type that there is not."""
    from edgedistill.formats.gguf.types import file_type

    try:
        file_type(inputs.recipe.baselines.quantized_teacher or "F16")
    except UsageError as error:
        raise RecipeError(error.message, error.hint, key="baselines.quantized_teacher", file=inputs.path) from None


def _refuse_draft(inputs: Inputs) -> None:
    """Refuse a draft of what llama.cpp does not run, of a shape or type that there is not, and without a suite to measure it on."""
    from edgedistill.formats.gguf.types import file_type

    draft = inputs.recipe.draft
    if draft is None:
        return
    told: tuple[str, str, str] | None = None
    for target in inputs.targets:
        if target.name in draft.targets and target.runtime.format != "gguf":
            told = (f"{target.name} is an ONNX target: drafts run in llama.cpp", "take it out", "targets")
    if not any(suite.metric != "perplexity" for suite in inputs.recipe.suites.values()):
        told = ("a draft is measured on the prompts of a suite, and none is answered", "add one to [suites]", "targets")
    try:
        if file_type(draft.type).imatrix == "required":
            told = (f"{draft.type} needs an importance matrix, and drafts have none", 'take "Q4_0", or "Q8_0"', "type")
    except UsageError as error:
        told = (error.message, error.hint, "type")
    if told is not None:
        raise RecipeError(told[0], told[1], key=f"draft.{told[2]}", file=inputs.path)
    _refuse_shape(draft_inputs(inputs), "draft")


def _refuse_shape(inputs: Inputs, section: str) -> None:
    """Refuse layers, neurons and tokens that the model which is cut does not have; ``section`` is named in errors."""
    student, facts = inputs.recipe.student, inputs.student.facts
    layers = student.layers
    if (isinstance(layers, int) and layers > facts.layers) or (
        isinstance(layers, tuple) and max(layers) >= facts.layers
    ):
        whole = {"student": student.model, "draft": "the student"}.get(section, "the model before this link")
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
    facts = inputs.student.facts
    model = "the student" if key == "draft.ffn" else inputs.recipe.student.model
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
    """Refuse a vocabulary larger than the model's, of a tokenizer that cannot spell what was cut away, or too small for that."""
    from edgedistill.families import BYTES, check_trimmable

    model, facts = inputs.recipe.student.model, inputs.student.facts
    if size > facts.vocab:
        raise RecipeError(
            f"the vocabulary of {model} has {facts.vocab} tokens",
            f"take fewer of them, or leave {key} out",
            key=key,
            file=inputs.path,
        )
    least = BYTES
    if (
        inputs.student.path.is_dir()
    ):  # a GGUF that `base` dequantizes has a byte-level BPE tokenizer, or is refused there
        try:
            least = check_trimmable(inputs.student.path)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, key=key, file=inputs.path) from None
    if size < least:
        raise RecipeError(
            f"{least} tokens spell whatever is written, single bytes and added tokens: {size} are fewer",
            f"take {-(-(least + 1) // 64) * 64} or more; the rows that are taught need theirs beside these",
            key=key,
            file=inputs.path,
        )


def _refuse_target(inputs: Inputs, target: Target, who: str) -> list[str]:
    """Refuse a file size that no type can meet; warn where the chosen one is estimated above it. ``who`` is to fit the target."""
    from edgedistill.formats.gguf.types import FILE_TYPES, file_type, fits

    name = target.name if who == "this student" else f"{target.name}, {who}"
    if target.runtime.format == "onnx":
        if not package_version("onnxruntime-genai"):
            raise UsageError(
                f"target {target.name}: ONNX needs onnxruntime-genai, which is not installed",
                "pip install 'edgedistill[onnx]'",
            )
        return [f"{name}: {warning}" for warning in refuse_onnx(target, who, student_facts(inputs).config())]
    facts = student_facts(inputs)
    config = facts.config()
    wanted = target.quantize.type
    if wanted == AUTO:
        found = [*refuse_auto(target, who, config), *refuse_kv(target, facts, target.auto_size or 0)]
        return [f"{name}: {warning}" for warning in found]
    size, found = refuse_size(target, who, config)
    warnings = [f"{name}: {warning}" for warning in [*refuse_kv(target, facts, size), *found]]
    base, hidden = file_type(wanted).base, facts.hidden
    if (origin := FILE_TYPES.get(facts.quantized_from)) is not None and origin.base == base:
        warnings.append(
            f"{name}: the student's weights came in {facts.quantized_from}, and rounding to {base} puts them back there, which "
            "takes back a part of what they are taught; take another type of about this size"
        )
    odd = [n for n in sorted({hidden, facts.heads * facts.head, facts.ffn}) if fits(base, n) != base]
    if odd:
        told = (
            f"; hidden = {hidden // 256 * 256 or 256} would not"
            if inputs.recipe.student.hidden and hidden in odd
            else ""
        )
        warnings.append(
            f"{name}: {', '.join(map(str, odd))} columns are no multiple of 256, so "
            f"{'much' if hidden in odd else 'a part'} of {wanted} falls back to larger types (quantize says which): "
            f"about {format_size(size)}{told}"
        )
    return warnings
