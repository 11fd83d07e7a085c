"""``quantize MODEL``: the same steps as a build (convert, calibrate, quantize), without a recipe, through the same
store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import EdgeDistillError, UsageError
from edgedistill.fingerprint import Key, digest
from edgedistill.models import KINDS, Resolved, resolve
from edgedistill.plan import Graph, Plan, package_version
from edgedistill.rates import Work
from edgedistill.runner import Reporter, Runner
from edgedistill.stages.base import Base
from edgedistill.stages.calibrate import CalibrateText
from edgedistill.stages.convert import Convert
from edgedistill.stages.import_gguf import ImportGguf
from edgedistill.stages.quantize import Quantize
from edgedistill.store import Store
from edgedistill.target import Types, find_target

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
    store: Store | None = None,
    reporter: Reporter | None = None,
) -> list[Quantized]:
    """Quantize ``model`` for every target and to every type; files go to ``out``, by hard link from the store.

    ``model`` is an HF folder, a full-precision GGUF, or a source (hf:, path:, pypi:, gguf:). ONNX targets need an HF
    folder. Raises UsageError for what cannot work, before anything runs.
    """
    from edgedistill.formats.gguf.types import FILE_TYPES, file_type

    if not targets and not types:
        raise UsageError(
            "nothing to make: no target and no type", "give -t TARGET (edgedistill targets list) or --types Q4_K_M"
        )
    store, reporter = store or Store(), reporter or Reporter()
    source = model if model.split(":", 1)[0] in KINDS else f"path:{model}"
    resolved = resolve(source, store.root, note=reporter.note)
    wanted: list[tuple[str, str, Types]] = []  # name, format, what its weights become
    for name in targets:
        target = find_target(name, Path())
        wanted.append((name, target.runtime.format, target.quantize))
    for name in types:
        wanted.append((name, "gguf", Types(type=name, imatrix=file_type(name).imatrix != "no")))
    is_gguf = resolved.path.is_file()
    if is_gguf and resolved.facts.quantized_from not in ("", *FULL_PRECISION) and resolved.kind != "pypi":
        raise UsageError(
            f"{resolved.path}: already quantized ({resolved.facts.quantized_from}); "
            "quantizing it again only adds error",
            "give the f16, bf16 or f32 GGUF, or the HF folder it was made from",
        )
    if is_gguf and resolved.kind != "pypi" and any(format_ == "onnx" for _, format_, _ in wanted):
        raise UsageError("an ONNX target needs the HF folder, not a GGUF", "give the folder that save_pretrained wrote")
    for name, format_, choice in wanted:
        if format_ == "gguf" and FILE_TYPES[choice.type].imatrix == "required" and calibration is None:
            raise UsageError(
                f"{name}: {choice.type} needs an importance matrix", "give --calibration FILE: JSONL rows or plain text"
            )
    plan, keys = _plan(resolved, wanted, calibration, store)
    if calibration is None and any(format_ == "gguf" and choice.imatrix for _, format_, choice in wanted):
        reporter.note(
            "no --calibration FILE: quantizing without an importance matrix, which costs accuracy at 4 bits and under"
        )
    outcome = Runner(plan, store, reporter).build()
    for error in outcome.failed.values():
        raise error
    return [_publish(store, key, line, out, model) for key, line in zip(keys, wanted, strict=True)]


def _plan(
    resolved: Resolved, wanted: list[tuple[str, str, Types]], calibration: Path | None, store: Store
) -> tuple[Plan, list[Key]]:
    graph, params = Graph(), resolved.facts.params()
    llama = f"llama-cpp-python {package_version('llama-cpp-python')}"
    gguf_tool = f"gguf {package_version('gguf')}"
    size = Work(kind="bytes", amount=2 * params)
    base = container = None
    if resolved.path.is_file() and resolved.kind != "pypi":
        container = graph.add("import", ImportGguf(source_digest=resolved.digest, path=resolved.path.absolute()), size)
    else:
        tool = gguf_tool if resolved.path.is_file() else ""
        stage = Base(source_digest=resolved.digest, dtype="float32", tool=tool, path=resolved.path.absolute())
        base = graph.add("base", stage, size, disk=4 * params)
        if any(format_ == "gguf" for _, format_, _ in wanted):
            rows = sample_rows()
            title = Path(resolved.source.split(":", 1)[-1]).name
            convert = Convert(
                model=base, dtype="f16", tool=gguf_tool, title=title, licence=resolved.facts.licence, rows=rows
            )
            container = graph.add("convert", convert, Work(kind="convert", amount=2 * params), disk=2 * params)
    imatrix = None
    if calibration is not None and container is not None:
        text = _calibration_text(calibration)
        stage = CalibrateText(model=container, text=text, tool=llama)
        imatrix = graph.add("calibrate", stage, Work(kind="forward", amount=2 * params * sum(map(len, text)) / 4))
    keys = []
    for name, format_, choice in wanted:
        onnx = format_ == "onnx"
        model = base if onnx else container
        assert model is not None  # the checks above leave no other case
        stage = Quantize(
            model=model,
            calibration=imatrix if choice.imatrix and not onnx else None,
            format=format_,
            type=choice.type,
            embedding_type=choice.embedding_type,
            output_type=choice.output_type,
            rounding=choice.rounding,
            tool=f"onnxruntime-genai {package_version('onnxruntime-genai')}" if onnx else llama,
            rows=sample_rows(),
        )
        work = Work(kind="build-onnx" if onnx else "quantize", amount=2 * params)
        keys.append(graph.add(f"quantize/{name}", stage, work, disk=2 * params))
    return Plan(identity=digest(["quantize", resolved.digest]), steps=graph.steps()), keys


def _calibration_text(path: Path) -> tuple[str, ...]:
    """Read calibration text: rows (prompt and reference), or plain text in pieces of about 2,000 characters."""
    if path.suffix in (".jsonl", ".gz", ".parquet") or path.is_dir():
        rows = load_rows(path)
        return tuple("\n".join([*(str(m["content"]) for m in row.messages), row.reference or ""]) for row in rows[:400])
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})", "give a .jsonl or .txt file") from error
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


def _publish(store: Store, key: Key, line: tuple[str, str, Types], out: Path, model: str) -> Quantized:
    name, format_, choice = line
    entry = store.load(key)
    if entry is None:
        raise EdgeDistillError(f"quantize/{name}: its entry disappeared")
    stem = Path(model.split(":", 1)[-1]).name.removesuffix(".gguf") or "model"
    goal = out / (f"{stem}-{name}.gguf" if format_ == "gguf" else f"{stem}-{name}")
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
        notes=[report["warning"]] if report.get("warning") else [],
    )


def _link(source: Any, goal: Any) -> None:
    try:
        os.link(source, goal)
    except OSError:  # another disk
        shutil.copy2(source, goal)
