"""``quantize MODEL``: the same steps as a build (convert, calibrate, quantize), without a recipe, through the same
store.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.artifact import kv_lines
from edgedistill.data.prompts import Row, load_rows
from edgedistill.data.sources import SUFFIXES
from edgedistill.errors import EdgeDistillError, UsageError
from edgedistill.expand_quantize import (
    add_choice,
    add_general,
    add_kv_cache,
    add_sensitivity,
    is_wide,
    onnx_options,
)
from edgedistill.fingerprint import Key, digest
from edgedistill.kv_cache import F16, arguments
from edgedistill.models import KINDS, Resolved, kept, resolve
from edgedistill.plan import Graph, Plan, check_machine, package_version
from edgedistill.rates import MIB, Work, base_memory, calibrate_memory, convert_memory, quantize_memory
from edgedistill.refusals_auto import refuse_auto, refuse_onnx, refuse_size, speeds_of
from edgedistill.refusals_kv import refuse_kv
from edgedistill.runner import Reporter, Runner, assess, check_disk
from edgedistill.stages.base import Base
from edgedistill.stages.calibrate import CalibrateText
from edgedistill.stages.convert import Convert
from edgedistill.stages.import_gguf import ImportGguf
from edgedistill.stages.quantize import Quantize
from edgedistill.stages.sensitivity import Sensitivity
from edgedistill.stages.sensitivity_onnx import SensitivityOnnx
from edgedistill.store import Entry, Store
from edgedistill.target import AUTO, Target, Types, find_target, format_size, parse_size

FULL_PRECISION = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """One file that was made: where it lies, and what the report of its step says."""

    name: str
    format: str
    type: str
    path: Path
    size: int
    bpw: float
    fallbacks: list[str]
    notes: list[str]
    over: str = ""
    """How its size misses the target's limit; "" where it does not."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "path": str(self.path)}


def quantize_model(
    model: str,
    *,
    targets: Sequence[str],
    types: Sequence[str],
    out: Path,
    calibration: Path | None = None,
    general: int = 0,
    size: int | str | None = None,
    store: Store | None = None,
    reporter: Reporter | None = None,
    dry_run: bool = False,
) -> list[Quantized]:
    """Quantize ``model`` for every target and to every type; files go to ``out``, by hard link from the store.

    The type "auto" chooses one for every matrix, so that the file has ``size`` (bytes, or words such as "90 MiB") at most. With
    ``dry_run`` the choice is made and no file. GGUF files are calibrated on the text of ``calibration`` and on ``general``
    conversations that the model writes itself; what ONNX targets round goes by ``calibration`` alone.

    ``model`` is an HF folder, a full-precision GGUF, or a source (hf:, path:, pypi:, gguf:). ONNX targets need an HF
    folder. Raises UsageError for what cannot work, before anything runs.
    """
    from edgedistill.formats.gguf.types import FILE_TYPES, file_type

    if not targets and not types:
        raise UsageError(
            "nothing to make: no target and no type", "give -t TARGET (edgedistill targets list) or --types Q4_K_M"
        )
    try:
        most = None if size is None else parse_size(size)
    except ValueError as error:
        raise UsageError(f"--size: {error}", "--size '90 MiB'") from None
    store, reporter = store or Store(), reporter or Reporter()
    source = model if model.split(":", 1)[0] in KINDS else f"path:{model}"
    resolved = resolve(source, store.root, pin=kept(source, store.root, reporter.note), note=reporter.note)
    wanted: list[tuple[str, str, Types]] = []  # name, format, what its weights become
    speeds: dict[str, Any] = {}
    caches: dict[str, Target] = {}
    profiles = {name: find_target(name, Path()) for name in targets}
    for name, target in profiles.items():
        speeds[name] = speeds_of(target)
        if target.kv != F16:
            caches[name] = target
        auto = target.auto_size if target.quantize.type == AUTO else None
        wanted.append((name, target.runtime.format, target.quantize.model_copy(update={"size": auto})))
    for name in types:
        if name == AUTO and most is None:
            raise UsageError('type "auto" needs a size to keep to', "--size '90 MiB'")
        imatrix = name == AUTO or file_type(name).imatrix != "no"
        wanted.append((name, "gguf", Types(type=name, imatrix=imatrix, size=most if name == AUTO else None)))
    if most is not None and AUTO not in types:
        raise UsageError(
            "--size is for --types auto: other types have the size that they have, targets quantize.size",
            "--types auto",
        )
    goals: dict[Path, str] = {}
    for name, format_, _ in wanted:
        goal = _goal(out, model, name, format_)
        if (other := goals.setdefault(goal, name)) != name:
            raise UsageError(
                f"{other} and {name} would both be written to {goal}", "one after the other, each with a folder: -o DIR"
            )
    if dry_run and any(choice.type != AUTO for _, _, choice in wanted):
        raise UsageError("--dry-run shows what auto chooses", "--types auto --size '90 MiB' --dry-run")
    is_gguf = resolved.path.is_file()
    if is_gguf and resolved.facts.quantized_from not in ("", *FULL_PRECISION) and resolved.kind != "pypi":
        raise UsageError(
            f"{resolved.path}: already quantized ({resolved.facts.quantized_from}); "
            "quantizing it again only adds error",
            "give the f16, bf16 or f32 GGUF, or the HF folder it was made from",
        )
    if is_gguf and resolved.kind != "pypi" and any(format_ == "onnx" for _, format_, _ in wanted):
        raise UsageError("an ONNX target needs the HF folder, not a GGUF", "give the folder that save_pretrained wrote")
    if general and all(format_ == "onnx" for _, format_, _ in wanted):
        raise UsageError(
            "--general is for GGUF files: llama.cpp writes the conversations",
            "leave it out; ONNX targets go by --calibration FILE",
        )
    for name, format_, choice in wanted:
        if calibration is not None or (general and format_ == "gguf"):
            continue
        if choice.type == AUTO or (format_ == "onnx" and choice.rounding == "gptq"):
            what = "choose types" if choice.type == AUTO else "round with feedback"
            raise UsageError(
                f"{name}: to {what} takes text of the task",
                "give --calibration FILE: rows (JSONL, CSV, …) or plain text"
                + ("; or --general 64: text that the model writes itself" if format_ == "gguf" else ""),
            )
        if format_ == "gguf" and FILE_TYPES[choice.type].imatrix == "required":
            raise UsageError(
                f"{name}: {choice.type} needs an importance matrix",
                "give --calibration FILE: rows (JSONL, CSV, …) or plain text; or --general 64: text that the model writes itself",
            )
    for name, format_, choice in wanted:
        if format_ == "onnx":
            if resolved.facts.template is False:
                raise UsageError(
                    f"{name}: an ONNX folder is proved on chat prompts, and the model has no chat template",
                    "add its chat_template.jinja to the folder, or take a GGUF target",
                )
            if not package_version("onnxruntime-genai"):
                raise UsageError(
                    f"target {name}: ONNX needs onnxruntime-genai, which is not installed",
                    "pip install 'edgedistill[onnx]'",
                )
            for warning in refuse_onnx(profiles[name], "this model", resolved.facts.config()):
                reporter.note(warning)
            if general and (choice.type == AUTO or choice.rounding == "gptq"):
                reporter.note(f"{name}: --general is for GGUF files: it goes by --calibration alone")
        elif choice.type == AUTO:
            _refuse_choice(resolved, choice, profiles.get(name), reporter)
        elif name in profiles:
            for warning in refuse_size(profiles[name], "this model", resolved.facts.config())[1]:
                reporter.note(f"{name}: {warning}")
    for name, target in caches.items():
        for warning in refuse_kv(target, resolved.facts, 0):
            reporter.note(f"{name}: {warning}")
        if calibration is None and not general:
            missed = (
                "no types are chosen for its KV cache" if target.kv == AUTO else "its KV cache is not compared with f16"
            )
            reporter.note(f"{name}: no --calibration FILE to fill the context with, so {missed}")
    plan, keys = _plan(resolved, wanted, calibration, general, speeds, caches)
    if dry_run:
        plan = plan.only(plan.match("allocate"))
    calibrated = any(_is_calibrated(format_, choice) for _, format_, choice in wanted)
    onnx = any(f == "onnx" and (choice.type == AUTO or choice.rounding == "gptq") for _, f, choice in wanted)
    unread = ["--general"] if general and not (calibrated or caches) else []
    if calibration is not None and not (calibrated or caches or onnx):
        unread.insert(0, f"--calibration {calibration}")
    if unread:
        names = ", ".join(name for name, _, _ in wanted)
        reporter.note(f"left out: {' and '.join(unread)}, since no importance matrix is read by {names}")
    if calibration is None and not general and calibrated:
        reporter.note(
            "no --calibration FILE: quantizing without an importance matrix, which costs accuracy at 4 bits and under"
        )
        for name, format_, choice in wanted:
            if format_ == "gguf" and choice.rounding == "gptq":  # which takes an importance matrix, too
                reporter.note(f"{name}: no --calibration FILE: rounded to the nearest value, not by gptq")
    check_machine(plan, "take a smaller model, or a machine with more memory")
    verdicts = assess(plan, store)
    check_disk(((step, verdicts[step.key]) for step in plan.steps), store)
    outcome = Runner(plan, store, reporter).build()
    for error in outcome.failed.values():
        raise error
    if dry_run:
        return [_chosen(store, plan, line) for line in wanted]
    made = [_publish(store, plan, key, line, out, model) for key, line in zip(keys, wanted, strict=True)]
    return [replace(one, over=_over(one, profiles.get(one.name))) for one in made]


def _over(made: Quantized, target: Target | None) -> str:
    """Say how a file is larger than its target allows; "" where it is not."""
    limit = None if target is None else target.limits.file_size
    if limit is None or made.size <= limit:
        return ""
    return f"{made.name}: {format_size(made.size)} is over its file_size of {format_size(limit)}"


def _is_calibrated(format_: str, choice: Types) -> bool:
    """Tell whether a file goes by an importance matrix, or is rounded by the text that one is measured on."""
    if format_ == "onnx" or not choice.imatrix:
        return False
    from edgedistill.formats.gguf.types import reads_imatrix

    return (
        choice.type == AUTO
        or choice.rounding == "gptq"
        or reads_imatrix(choice.type, choice.embedding_type, choice.output_type)
    )


def _refuse_choice(resolved: Resolved, choice: Types, target: Target | None, reporter: Reporter) -> None:
    """Raise UsageError where the types of ``resolved`` cannot be chosen, or nothing meets the limits of a ``target``; tell its
    warnings.
    """
    from edgedistill.formats.gguf.types import smallest_choice

    if resolved.path.is_file() and resolved.kind != "pypi":
        # Gradients are taken by transformers: the file must become a checkpoint first.
        from edgedistill.formats.gguf.dequantize import hf_config, hf_tensor_name, tokenizer_json
        from edgedistill.formats.gguf.read import read_info

        info = read_info(resolved.path)
        names = [hf_tensor_name(tensor.name) for tensor in info.tensors]
        hf_config(info, dtype="float32", tied="lm_head.weight" not in names)
        tokenizer_json(info)
    config = resolved.facts.config()
    if target is not None:
        for warning in refuse_auto(target, "this model", config):
            reporter.note(warning)
    elif choice.size is not None and (least := smallest_choice(config)) > choice.size:
        raise UsageError(
            f"no choice of types brings this model under {format_size(choice.size)}: the smallest makes about "
            f"{format_size(least)}",
            "give a larger --size, or a smaller model",
        )


def _plan(
    resolved: Resolved,
    wanted: list[tuple[str, str, Types]],
    calibration: Path | None,
    general: int,
    speeds: Mapping[str, Any],
    caches: Mapping[str, Target],
) -> tuple[Plan, list[Key]]:
    graph, params = Graph(), resolved.facts.params()
    llama = f"llama-cpp-python {package_version('llama-cpp-python')}"
    gguf_tool = f"gguf {package_version('gguf')}"
    size = Work(kind="bytes", amount=2 * params)
    base = container = wide = None
    if resolved.path.is_file() and resolved.kind != "pypi":
        container = graph.add("import", ImportGguf(source_digest=resolved.digest, path=resolved.path.absolute()), size)
    else:
        tool = gguf_tool if resolved.path.is_file() else ""
        stage = Base(source_digest=resolved.digest, dtype="float32", tool=tool, path=resolved.path.absolute())
        whole = 4 * params if tool else resolved.facts.size
        base = graph.add("base", stage, size, memory=base_memory(whole), disk=bool(tool) * whole)  # a folder is linked
        if any(format_ == "gguf" for _, format_, _ in wanted):
            rows = sample_rows()
            title = Path(resolved.source.split(":", 1)[-1]).name
            convert = Convert(
                model=base, dtype="f16", tool=gguf_tool, title=title, licence=resolved.facts.licence, rows=rows
            )
            work = Work(kind="convert", amount=2 * params)
            container = graph.add("convert", convert, work, memory=convert_memory(params), disk=2 * params)
            if any(format_ == "gguf" and is_wide(choice) for _, format_, choice in wanted):
                work = Work(kind="convert", amount=4 * params)
                wide = graph.add(
                    "convert/f32",
                    replace(convert, dtype="f32"),
                    work,
                    memory=convert_memory(params, wide=True),
                    disk=4 * params,
                )
    imatrix = sensitivity = of_onnx = None
    text = _calibration_text(calibration) if calibration is not None else ()
    builder = f"onnxruntime-genai {package_version('onnxruntime-genai')}"
    calibrated = caches or any(_is_calibrated(format_, choice) for _, format_, choice in wanted)
    if (text or general) and container is not None and calibrated:
        own = add_general(graph, "converse", container, general, params, llama)
        stage = CalibrateText(model=container, text=text, tool=llama, general=own)
        work = Work(kind="forward", amount=2 * params * sum(map(len, text)) / 4)
        imatrix = graph.add("calibrate", stage, work, memory=calibrate_memory(params), disk=4 * MIB)
        if any(choice.type == AUTO and format_ == "gguf" for _, format_, choice in wanted):
            stage = Sensitivity(
                model=container, checkpoint=base, kept=None, text=text, rows=len(text), tool=llama, general=own
            )
            sensitivity = add_sensitivity(graph, "sensitivity", stage, params)
    if base is not None and any(choice.type == AUTO and format_ == "onnx" for _, format_, choice in wanted):
        stage = SensitivityOnnx(checkpoint=base, kept=None, text=text, rows=len(text), tool=builder)
        of_onnx = add_sensitivity(graph, "sensitivity-onnx", stage, params)
    keys = []
    for name, format_, choice in wanted:
        onnx = format_ == "onnx"
        model = base if onnx else wide if wide and is_wide(choice) else container
        assert model is not None  # the checks above leave no other case
        types, table = None, of_onnx if onnx else sensitivity
        if choice.type == AUTO:
            assert table is not None and choice.size is not None
            types = add_choice(graph, f"allocate/{name}", model, table, choice.size, speeds.get(name))
        stage = Quantize(
            model=model,
            calibration=imatrix if _is_calibrated(format_, choice) else None,
            format=format_,
            type=choice.type,
            embedding_type=choice.embedding_type,
            output_type=choice.output_type,
            rounding=choice.rounding,
            tool=builder if onnx else llama,
            types=types,
            sensitivity=table if types else None,
            text=text if onnx and choice.rounding == "gptq" else (),
            imported=base is None and choice.type == "F16",
            rows=sample_rows(),
            **onnx_options(choice),
        )
        work = Work(kind="build-onnx" if onnx else "quantize", amount=2 * params)
        memory = quantize_memory(params, onnx=onnx, gptq=choice.rounding == "gptq", chosen=types is not None)
        keys.append(graph.add(f"quantize/{name}", stage, work, memory=memory, disk=2 * params))
        if name in caches and imatrix is not None:
            add_kv_cache(graph, f"kv-cache/{name}", caches[name], keys[-1], imatrix, resolved.facts)
    return Plan(identity=digest(["quantize", resolved.digest]), steps=graph.steps()), keys


def _calibration_text(path: Path) -> tuple[str, ...]:
    """Read calibration text: rows (prompt and reference), or plain text in pieces of about 2,000 characters."""
    if path.name.endswith((*SUFFIXES, ".gz")) or path.is_dir():
        rows = load_rows(path)
        return tuple(
            "\n".join([*(str(m.get("content") or "") for m in row.messages), row.reference or ""]) for row in rows[:400]
        )
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise UsageError(
            f"{path}: cannot be read as text ({why})",
            f"give plain text in UTF-8, or rows: {', '.join(SUFFIXES)}",
        ) from error
    if not text.strip():
        raise UsageError(f"{path}: empty", "give some text of the kind that the model will see")
    return tuple(text[start : start + 2000] for start in range(0, min(len(text), 800_000), 2000))


def sample_rows() -> tuple[Row, ...]:
    """Return ordinary text to check a hop on, where no recipe brings the user's own."""
    texts = (
        "Wake me at 6:45 tomorrow, please.",
        "What is 17 * 23? Explain it in one sentence.",
        "Écris « bonjour » en trois langues 🙂",
        "def add(a, b):\n    return a + b  # 2,000.50",
    )
    return tuple(
        Row(id=f"sample-{number}", messages=({"role": "user", "content": text},)) for number, text in enumerate(texts)
    )


def _choice(store: Store, plan: Plan, name: str) -> tuple[dict[str, Any], list[str]]:
    """Return what ``allocate`` found for ``name``, and how it reads; nothing where types were given."""
    steps = [step for step in plan.steps if f"allocate/{name}" in step.ids]
    entry = store.load(steps[0].key) if steps else None
    if entry is None:
        return {}, []
    found = entry.facts["allocate"]
    chosen = ", ".join(f"{part} {count} x {type_name}" for part, type_name, count, _ in found["groups"])
    front = ", ".join(f"{format_size(size)} {kld:.3g}" for size, kld in found["front"])
    return found, [
        f"predicted KLD {found['predicted_kld']:.3g} nats a token: {chosen}",
        f"predicted KLD at other sizes: {front}",
        *(
            f"{test}: {of['predicted']:.4g} tokens/s predicted, {of['limit']:g} asked"
            for test, of in found.get("speeds", {}).items()
        ),
    ]


def _cached(store: Store, plan: Plan, name: str) -> list[str]:
    """Say what the KV cache of a target costs, and how the file is run with it."""
    steps = [step for step in plan.steps if f"kv-cache/{name}" in step.ids]
    entry = store.load(steps[0].key) if steps else None
    if entry is None:
        return []
    found = entry.facts["kv_cache"]
    lines = [f"KV cache {line.removeprefix('- ')}" for line in kv_lines(found)]
    return [*lines, f"run it with{arguments((found['k'], found['v'])) or ' an f16 KV cache'}"]


def _measured(entry: Entry) -> list[str]:
    """Say how far a file is from full precision; what the KLD of one with types of its own came to; what rounding gained in an ONNX
    folder.
    """
    if "rounding" in entry.facts:
        gained, hop = entry.facts["rounding"], entry.facts["hop"]
        kinds = ", ".join(f"{count} x {kind}" for kind, count in gained["kinds"].items())
        return [
            f"{kinds}, rounded with feedback: squared error of the products {gained['before']:.3g} to nearest, "
            f"{gained['after']:.3g} so; KLD {hop['kld']:.3g} nats a token on {hop['prompts']} prompts"
        ]
    from edgedistill.formats.gguf.quantize_check import QuantizedHop

    lines = [QuantizedHop(**hop).told()] if "limit" in (hop := entry.facts.get("hop", {})) else []
    if "measured" not in entry.facts:
        return lines
    found = entry.facts["measured"]
    kld = found["kld"]
    interval = (
        f" [{kld['low']:.3g}, {kld['high']:.3g}]" if math.isfinite(kld["high"]) else ""
    )  # of one text there is none
    return [
        f"measured KLD {kld['value']:.3g}{interval} nats a token, on {kld['n']} of the texts that the types were chosen by "
        f"({found['tokens']} tokens)",
        *lines,
    ]


def _chosen(store: Store, plan: Plan, line: tuple[str, str, Types]) -> Quantized:
    """Describe the file that a dry run would make."""
    name, format_, choice = line
    found, notes = _choice(store, plan, name)
    return Quantized(
        name=name, format=format_, type=choice.type, path=Path(), size=found["size"], bpw=0.0, fallbacks=[], notes=notes
    )


def _goal(out: Path, model: str, name: str, format_: str) -> Path:
    """Return where a file goes. A profile that was given as a file is called by its name."""
    stem = Path(model.split(":", 1)[-1]).name.removesuffix(".gguf") or "model"
    called = Path(name).stem if name.endswith(".toml") or "/" in name else name  # as ``find_target`` tells them apart
    return out / (f"{stem}-{called}.gguf" if format_ == "gguf" else f"{stem}-{called}")


def _publish(store: Store, plan: Plan, key: Key, line: tuple[str, str, Types], out: Path, model: str) -> Quantized:
    name, format_, choice = line
    entry = store.load(key)
    if entry is None:
        raise EdgeDistillError(f"quantize/{name}: its entry disappeared")
    goal = _goal(out, model, name, format_)
    source = entry.path / ("model.gguf" if format_ == "gguf" else "onnx")
    try:
        if goal.is_dir():
            shutil.rmtree(goal)
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.unlink(missing_ok=True)
        shutil.copytree(source, goal, copy_function=_link) if source.is_dir() else _link(source, goal)
    except OSError as error:
        raise UsageError(f"{goal}: cannot be written ({error.strerror})", "give another folder: -o DIR") from error
    report = entry.facts.get("quantize", {})
    return Quantized(
        name=name,
        format=format_,
        type=choice.type,
        path=goal,
        size=int(entry.facts["size"]),
        bpw=float(report.get("bpw", 0.0)),
        fallbacks=[
            f"{t['name']}: {t['asked']} -> {t['got']}" for t in report.get("tensors", []) if t["asked"] != t["got"]
        ],
        notes=([report["warning"]] if report.get("warning") else [])
        + _choice(store, plan, name)[1]
        + _measured(entry)
        + _cached(store, plan, name),
    )


def _link(source: Any, goal: Any) -> None:
    try:
        os.link(source, goal)
    except OSError:  # another disk
        shutil.copy2(source, goal)
