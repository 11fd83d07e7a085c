"""Symptoms that a build's figures show, each with what is likely and the recipe key that mends it.

A finding needs evidence: intervals that do not overlap, a paired difference whose interval leaves out 0, or an interval
beyond a threshold, which says where it stands why it is this one. Silence means that nothing was seen, not that nothing is
wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from edgedistill.report import Figure, Finding, Model, ReportData
from edgedistill.report_read import last_link
from edgedistill.target import format_size

EXPECTED = 0.85  # what a student of the same family keeps on a narrow task
FORMED = 0.95  # of answers that parse: the form is learnt
FORGOTTEN = 1.1  # times the base's perplexity; a tenth is what a change of precision or of engine may do
SHARED = 0.5  # of the wrong answers: most of them
OVERSURE = 0.02  # confidence above accuracy; less moves no decision that an application takes by it
EMPTY = 0.2  # of the blocks of thinking: a tenth are short because the question is easy
UNSEEN = 1.5  # times the loss of training: suites hold harder text than the rows that are learnt, on purpose


def diagnose(data: ReportData) -> list[Finding]:
    """Return what the figures show, the most telling first. Only what can be computed from what exists."""
    checks = (
        _speed_noise,
        _teacher_wrong,
        _capacity,
        _not_trained_out,
        _new_prompts,
        _train_and_held_out,
        _form_without_content,
        _forgetting,
        _confident_and_wrong,
        _teachers_errors,
        _comparisons,
        _soft_targets,
        _rounds,
        _quantization,
        _quantization_alone,
        _grammar,
        _weak_functions,
        _cut,
        _thinking,
        _gradients,
        _draft,
        _cache,
    )
    return [finding for check in checks for finding in check(data)]


def _student(data: ReportData) -> Model | None:
    return data.model("student")


def _speed_noise(data: ReportData) -> Iterator[Finding]:
    noisy = {model.label: model.speed.noise for model in data.models if model.speed and model.speed.noise}
    if noisy:
        yield Finding(
            symptom="speeds were measured on a noisy machine",
            figure="; ".join(f"{label}: {', '.join(dict.fromkeys(noise))}" for label, noise in noisy.items()),
            likely="other programs were running, or the machine slowed itself down",
            remedy="leave the machine alone and measure again",
            key="build --remeasure",
        )


def _teacher_wrong(data: ReportData) -> Iterator[Finding]:
    rejected = data.yields.get("gold", 0) + data.yields.get("hedged", 0)
    total = data.yields.get("kept", 0)
    if total and rejected / total > 0.3:
        yield Finding(
            symptom="the teacher fails on much of its own training text",
            figure=f"{rejected} of {total} kept rows ({rejected / total:.0%}) are references or hedges, because no answer passed",
            likely="the capability is not there yet: there is little to distil",
            remedy="train the teacher longer, or take a better one",
            key="adapt.rows, adapt.epochs, teacher.min_score",
        )


def _kept(model: Model) -> dict[str, Figure]:
    return {suite: line.retention for suite, line in model.suites.items() if line.retention}


def _under(figure: Figure, bound: float) -> bool:
    return (figure.high if figure.high is not None else figure.value) < bound


def _capacity(data: ReportData) -> Iterator[Finding]:
    student = _student(data)
    kept = _kept(student) if student else {}
    if kept and all(_under(figure, EXPECTED) for figure in kept.values()) and not list(_not_trained_out(data)):
        yield Finding(
            symptom="the gap to the teacher stays on every suite",
            figure=", ".join(f"{suite}: keeps {figure.text(n=True)}" for suite, figure in kept.items()),
            likely="capacity: the loss no longer falls, yet the student stays behind",
            remedy="more layers, wider FFNs, a larger hidden size, a larger student, or a narrower task",
            key="student.layers, student.ffn, student.hidden, student.model",
        )


def _not_trained_out(data: ReportData) -> Iterator[Finding]:
    for step, key in (("heal", "heal.epochs"), (last_link(data.curves), "distill.epochs")):
        # Where rows go from easy to hard, the loss says how hard they are.
        losses = [line["loss"] for line in data.curves.get(step, ()) if not line.get("eased")]
        tenth = len(losses) // 10
        if tenth < 3:
            continue
        last, before = statistics.median(losses[-tenth:]), statistics.median(losses[-3 * tenth : -2 * tenth])
        student = _student(data)
        behind = student is None or any(figure.value < 0.95 for figure in _kept(student).values())
        if behind and last < 0.8 * before:
            yield Finding(
                symptom=f"{step} stopped while its loss was still falling",
                figure=f"median loss {before:.4f} a fifth of the run before the end, {last:.4f} at the end",
                likely="too few steps",
                remedy="train longer",
                key=key,
            )


def _new_prompts(data: ReportData) -> Iterator[Finding]:
    """Compare what is kept of the teacher between suites: intervals that do not overlap tell a gap between kinds of
    prompts.
    """
    student = _student(data)
    kept = sorted(_kept(student).items(), key=lambda item: item[1].value) if student else []
    if len(kept) < 2:
        return
    (worst, low), (best, high) = kept[0], kept[-1]
    if high.low is not None and _under(low, high.low):
        yield Finding(
            symptom=f"good on {best}, poor on {worst}",
            figure=f"keeps {high.text(n=True)} of the teacher on {best}, {low.text(n=True)} on {worst}",
            likely="overfitting to the training prompts",
            remedy="more diverse prompts, weight decay or dropout, fewer epochs",
            key="prompts.files, distill.weight_decay, distill.lora.dropout, heal.epochs",
        )


def _train_and_held_out(data: ReportData) -> Iterator[Finding]:
    """Compare the loss at the end of training with the same student's on references that it never saw, token by token."""
    student, learnt = _student(data), data.learnt
    held = student.calibration.get("nll") if student else None
    if not (held and learnt and held.low is not None and learnt.high is not None):
        return
    if held.low > UNSEEN * learnt.high:
        yield Finding(
            symptom="good on the training text, poor on new text",
            figure=f"cross-entropy {learnt.text(n=True)} steps at the end of training, {held.text(n=True)} rows of "
            f"{data.suites[0]} that were held out, nats a token",
            likely="overfitting to the training prompts, or prompts that are of another kind than the suite's",
            remedy="more diverse prompts, weight decay or dropout, fewer epochs",
            key="prompts.files, distill.weight_decay, distill.lora.dropout, distill.epochs, heal.epochs",
        )


def _confident_and_wrong(data: ReportData) -> Iterator[Finding]:
    student, teacher = _student(data), data.model("teacher")
    gap = student.calibration.get("gap") if student else None
    if not (student and gap and gap.low is not None and gap.low > OVERSURE):
        return
    error, other = student.calibration["error"], teacher.calibration.get("gap") if teacher else None
    yield Finding(
        symptom="the student is surer of its tokens than it is right",
        figure=f"confidence above accuracy {_signed(gap)} rows of {data.suites[0]}, expected calibration error {error.text()}"
        + (f"; the teacher's gap: {_signed(other)}" if other else ""),
        likely="calibration was lost on the way"
        if other and _under(other, gap.low)
        else "the text is harder than what was learnt, or the teacher is too sure as well",
        remedy="weigh the teacher's distribution more and the text less, at a higher temperature; fewer epochs",
        key="distill.loss.kd, distill.loss.ce, distill.loss.temperature, distill.epochs",
    )


def _form_without_content(data: ReportData) -> Iterator[Finding]:
    student, teacher = _student(data), data.model("teacher")
    for suite, line in student.suites.items() if student and teacher else ():
        known = teacher.suites.get(suite) if teacher else None
        if not (line.score and line.valid and line.retention and known and known.score):
            continue
        if line.valid.value >= FORMED and _under(line.retention, EXPECTED):
            yield Finding(
                symptom=f"the teacher's form without its content on {suite}",
                figure=f"{line.valid.text(n=True)} valid JSON, but {line.score.text(n=True)} right "
                f"(teacher {known.score.text()})",
                likely="surface patterns were learnt",
                remedy="more kept rows, checked against references; more of the teacher's distribution; rationales",
                key='[[filter]], prompts.files, score.n, generate.style = "rationale"',
            )


def _forgetting(data: ReportData) -> Iterator[Finding]:
    for name, keys in (
        ("teacher", "adapt.files, adapt.lr, adapt.epochs"),
        ("student", "heal.files, heal.lr, heal.epochs, distill.keep, distill.lr, distill.epochs"),
    ):
        model = data.model(name)
        for suite, line in model.suites.items() if model else ():
            ratio = line.against_base
            if ratio and (ratio.low if ratio.low is not None else ratio.value) > FORGOTTEN:
                yield Finding(
                    symptom=f"the {name} is worse than the base model on {suite}",
                    figure=f"perplexity {ratio.text(2)} times the base model's"
                    + (f" (n = {line.perplexity.n})" if line.perplexity else ""),
                    likely="forgetting" + (", and what pruning took away" if name == "student" else ""),
                    remedy="if the target needs it: general rows mixed in, lower learning rates, fewer epochs",
                    key=keys,
                )
    for step, facts in data.training.items():
        rise = Figure.read((facts.get("general") or {}).get("rise"))
        if rise and rise.low is not None and rise.low > math.log(FORGOTTEN):
            yield Finding(
                symptom=f"{step} forgets in spite of its general rows",
                figure=f"{_signed(rise)} rows held out, nats a token",
                likely="the task pulls harder than the rows hold",
                remedy="hold harder, or more rows; a bound that stops training",
                key="distill.keep.kl, distill.keep.share, distill.keep.stop",
            )


def _teachers_errors(data: ReportData) -> Iterator[Finding]:
    """Find errors that are the teacher's, word for word. Rows may simply be hard in one way: where a student that was trained on
    references alone errs as often like the teacher, nothing came from the teacher's text.
    """
    student, control = _student(data), data.model("gold-sft")
    for suite, line in student.suites.items() if student else ():
        share = _share(line.shared, line.errors)
        other = control.suites.get(suite) if control else None
        beside = _share(other.shared, other.errors) if other else None
        if not share or share.low is None or share.low <= SHARED:
            continue
        if beside and not _under(beside, share.low):
            continue
        yield Finding(
            symptom=f"the teacher's own errors come back on {suite}",
            figure=f"{share.text(2, n=True)} of the student's wrong answers are the teacher's, word for word"
            + (f"; of the one that learnt from references alone: {beside.text(2, n=True)}" if beside else ""),
            likely="contamination by wrong answers",
            remedy="filter by reference, mix in gold text",
            key='[[filter]] kind = "reference", otherwise = "gold"; distill.loss.ce',
        )


def _share(part: int | None, whole: int | None) -> Figure | None:
    if part is None or not whole:
        return None
    from edgedistill.evals.statistics import proportion

    return Figure.read(proportion(part, whole))


def _comparisons(data: ReportData) -> Iterator[Finding]:
    """Say so where an arm does better than the recipe; references only have a finding of their own."""
    for name in dict.fromkeys(one.name for one in data.comparisons if one.keys):
        lines = [one for one in data.comparisons if one.name == name and one.measure == "score"]
        verdicts = {one.verdict for one in lines}
        if "hurt" in verdicts and "helped" not in verdicts:
            yield Finding(
                symptom=f"{name} does better than what the recipe does",
                figure=", ".join(f"{one.suite}: {_signed(one.figure)}" for one in lines),
                likely="the method does not pay on this task, with this many rows",
                remedy="take its keys over, or give the method what it needs: more rows, a better teacher",
                key=", ".join(lines[0].keys),
            )


def _soft_targets(data: ReportData) -> Iterator[Finding]:
    lines = [line for line in data.differences if line.before == "gold-sft" and line.after == "student"]
    if any(line.noticed == "loss" for line in lines):
        yield Finding(
            symptom="gold-only training beats distilling",
            figure=", ".join(f"{line.suite}: {_signed(line.figure)}" for line in lines),
            likely="the teacher's distribution adds noise here, or its answers are worse than the references",
            remedy="weigh cross-entropy more, draw more samples, prove the teacher",
            key="distill.loss.kd, distill.loss.ce, score.n, teacher.min_score",
        )
    elif lines and not any(line.noticed for line in lines):
        yield Finding(
            symptom="distilling and gold-only training cannot be told apart",
            figure=", ".join(f"{line.suite}: {_signed(line.figure)}" for line in lines),
            likely="the task has references for every prompt, and they teach as much as the teacher",
            remedy="nothing, or fewer references; soft targets pay where references are few",
            key="prompts.files, distill.loss.kd",
        )


def _rounds(data: ReportData) -> Iterator[Finding]:
    if hurt := [line for line in data.comparisons if line.other == "before-rounds" and line.verdict == "hurt"]:
        yield Finding(
            symptom="the rounds made the student worse",
            figure=", ".join(f"{line.suite}: {_signed(line.figure)}" for line in hurt),
            likely="it forgot while it was trained on few prompts, or narrowed to what it wrote itself",
            remedy="fewer rounds, more prompts, more of the rows before, a lower learning rate",
            key="[[round]], round.replay, prompts.rows, distill.lr",
        )


def _signed(figure: Figure) -> str:
    bounds = "" if figure.low is None or figure.high is None else f" [{figure.low:+.3f}, {figure.high:+.3f}]"
    return f"{figure.value:+.3f}{bounds}" + (f", n = {figure.n}" if figure.n else "")


def _quantization(data: ReportData) -> Iterator[Finding]:
    for model in data.models:
        lines = [
            line
            for line in data.differences
            if line.before.partition("@")[0] == "student" and line.after == model.id and line.noticed == "loss"
        ]
        if not lines or model.kind != "artifact":
            continue
        fallen = data.fallbacks.get(f"quantize/{model.id}", {}).get("moved")
        target = model.id.partition("@")[0]  # of a link of a chain, too
        yield Finding(
            symptom=f"{model.id} loses accuracy to quantization",
            figure=", ".join(f"{line.suite}: {_signed(line.figure)}" for line in lines)
            + ", against the full-precision student",
            likely=f"{model.type} is too coarse for this student" + (" even where tensors fell back" if fallen else ""),
            remedy="a larger type, or a larger type for the embedding alone",
            key=f"quantize.{target}.type, quantize.{target}.embedding_type",
        )


def _quantization_alone(data: ReportData) -> Iterator[Finding]:
    """Say so where the quantized teacher already fits a target's file size: distilling must then be wanted for
    speed.
    """
    small = data.model("quantized-teacher")
    if small is None or not small.size:
        return
    fits = []
    for target, lines in data.gates.items():
        bound = next((line["bound"] for line in lines if line["name"] == "file_size"), None)
        if bound and small.size <= bound:
            artifact = data.model(target)
            own = f", artifact {artifact.speed.tg.value:.0f} tokens/s" if artifact and artifact.speed else ""
            fits.append(f"{target} (limit {format_size(bound)}{own})")
    if fits:
        speed = f", {small.speed.tg.value:.0f} tokens/s here" if small.speed else ""
        yield Finding(
            symptom="quantization alone fits the file size",
            figure=f"the teacher as {small.type}: {format_size(small.size)}{speed}; {', '.join(fits)}",
            likely="only speed or memory asks for a smaller student there",
            remedy="ship the quantized teacher where it is fast enough",
            key="gates.min_speedup; limits of the target",
        )


def _grammar(data: ReportData) -> Iterator[Finding]:
    for model in data.models:
        for suite, line in model.suites.items():
            if line.grammar_gain and line.grammar_gain.low is not None and line.grammar_gain.low > 0:
                yield Finding(
                    symptom=f"the grammar helps {model.label} on {suite}",
                    figure=_signed(line.grammar_gain),
                    likely="some answers break off the format",
                    remedy="decode with the grammar.gbnf that the package ships",
                    key=f"suites.{suite}.grammar",
                )


def _weak_functions(data: ReportData) -> Iterator[Finding]:
    student = _student(data)
    for suite, line in student.suites.items() if student else ():
        if not line.score or line.score.low is None:
            continue
        bound = line.score.low
        weak = {name: figure for name, figure in line.functions.items() if _under(figure, bound)}
        if weak:
            named = sorted(weak.items(), key=lambda item: item[1].value)[:4]
            yield Finding(
                symptom=f"some functions lag behind on {suite}",
                figure=", ".join(f"{name} {figure.text(2, n=True)}" for name, figure in named),
                likely="too few or too uniform training prompts for them",
                remedy="add prompts for these functions",
                key="prompts.files, adapt.files",
            )


def _cut(data: ReportData) -> Iterator[Finding]:
    for model in data.models:
        for suite, line in model.suites.items():
            if line.score and line.score.n and line.cut / line.score.n > 0.02:
                yield Finding(
                    symptom=f"answers of {model.label} on {suite} are cut off",
                    figure=f"{line.cut} of {line.score.n} did not end",
                    likely="a model that does not stop, or too few tokens allowed",
                    remedy="allow more tokens; if the model rambles, train it longer",
                    key=f"suites.{suite}.max_new_tokens",
                )


def _thinking(data: ReportData) -> Iterator[Finding]:
    teacher = data.model("teacher")
    for model in data.models:
        for suite, line in model.suites.items():
            found = line.thinking
            blocks = round(found["blocks"] * found["n"]) if found else 0
            empty = _share(round(found["empty"] * blocks), blocks) if found else None
            if not empty or empty.low is None or empty.low <= EMPTY:
                continue
            other = (
                teacher.suites[suite].thinking if teacher and model is not teacher and suite in teacher.suites else None
            )
            beside = f", the teacher's: {other['empty']:.0%}" if other else ""
            yield Finding(
                symptom=f"{model.label} thinks less than it writes on {suite}",
                figure=f"{empty.text(2, n=True)} of its blocks are empty{beside}",
                likely="thinking collapses: an empty block costs little, and the answer is guessed",
                remedy="weigh thinking up, and leave short traces out",
                key="distill.think_weight, [[filter]] kind = 'thinking'",
            )


def _gradients(data: ReportData) -> Iterator[Finding]:
    for step, curve in data.curves.items():
        pairs = [(x["gradient_kd"], x["gradient_ce"]) for x in curve if x.get("gradient_kd") and x.get("gradient_ce")]
        if not pairs:
            continue
        share = statistics.median(kd / ce for kd, ce in pairs)
        if not 0.1 <= share <= 10:
            yield Finding(
                symptom=f"one term of the loss rules {step}",
                figure=f"median gradient norm of kd over that of ce {share:.3g} (n = {len(pairs)} steps)",
                likely="weights or temperature out of balance",
                remedy="move the weights toward each other",
                key="distill.loss.kd, distill.loss.ce, distill.loss.temperature",
            )


def _draft(data: ReportData) -> Iterator[Finding]:
    for line in data.drafts:
        if not line.refused:
            continue
        yield Finding(
            symptom=f"the draft of {line.target} is not shipped",
            figure=f"{line.refused}; {line.acceptance.text(n=True)} of its tokens kept",
            likely="it guesses too little right for what it takes"
            if line.verdict != "helped"
            else "no room for two models",
            remedy="a smaller draft, more rows to learn from, fewer tokens at a time; or none: this target is fast enough alone",
            key="draft.layers, draft.ffn, draft.rows, draft.tokens, draft.min_probability",
        )


def _cache(data: ReportData) -> Iterator[Finding]:
    for line in data.caches:
        kld, rounding = line.kld, line.rounding
        if kld is None or rounding is None or kld.low is None or rounding.high is None or kld.low <= rounding.high:
            continue
        agree = f"; first choices agree {line.top1.text(n=True)}" if line.top1 else ""
        yield Finding(
            symptom=f"the KV cache of {line.target} loses more than rounding does",
            figure=f"KLD {kld.text(4)} nats a token from f16 at {line.context} tokens in {line.types}, n = {kld.n} rows; rounding "
            f"alone {rounding.text(4)}{agree}",
            likely="too few bits for keys or values at this length",
            remedy="more bits, of the keys first; or promise less context",
            key="runtime.kv_cache of the target, gates.max_kv_kld",
        )
