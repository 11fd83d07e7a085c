"""Quantize a full-precision GGUF to any of llama.cpp's types, and say tensor by tensor what was asked and what was
got.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill.child import bound
from edgedistill.cpus import usable_cpus
from edgedistill.errors import StepFailed, UsageError
from edgedistill.fingerprint import file_digest
from edgedistill.formats.gguf.read import GgufInfo, read_info
from edgedistill.formats.gguf.types import (
    FILE_TYPES,
    FINELY_ROUNDED,
    GGML_TYPES,
    NEEDS_IMATRIX,
    TensorPlan,
    file_type,
    fits,
    ggml_type,
    plan_tensors,
    rounded_in,
    row_bytes,
)

Progress = Callable[[int, int, str], None]

_WORKER = "import sys; from edgedistill.formats.gguf.quantize_worker import main; sys.exit(main())"


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One tensor: the type that the mix asked for, the type that it got, bytes, and bytes more than asked
    (fallback).
    """

    name: str
    shape: tuple[int, ...]
    asked: str
    got: str
    nbytes: int
    extra: int

    @property
    def fell_back(self) -> bool:
        return self.asked != self.got


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The result of one quantization. ``bpw`` counts tensor bytes; ``asked_bpw`` is what it would be without fallbacks.

    ``path`` and ``sha256`` are empty after a dry run, where ``size`` leaves out the header.
    """

    path: Path | None
    type: str
    size: int
    source_size: int
    bpw: float
    asked_bpw: float
    sha256: str
    tensors: tuple[TensorReport, ...]
    imatrix_entries: int
    without_imatrix: tuple[str, ...]
    library: dict[str, Any]
    seconds: float
    rounding: dict[str, Any] | None = None
    reused: int = 0  # tensors that were found in files of earlier builds

    @property
    def fallbacks(self) -> tuple[TensorReport, ...]:
        """Tensors that got another type than the mix asked for."""
        return tuple(tensor for tensor in self.tensors if tensor.fell_back)

    def warning(self) -> str:
        """Say in one sentence what fell back and what it costs; empty when nothing did."""
        fallen = self.fallbacks
        if not fallen:
            return ""
        kinds: dict[tuple[str, str], int] = {}
        for tensor in fallen:
            kinds[tensor.asked, tensor.got] = kinds.get((tensor.asked, tensor.got), 0) + 1
        columns = sorted({tensor.shape[-1] for tensor in fallen})
        moves = ", ".join(f"{count} x {asked} to {got}" for (asked, got), count in sorted(kinds.items()))
        extra = sum(tensor.extra for tensor in fallen)
        return (
            f"{len(fallen)} of {len(self.tensors)} tensors cannot have the type that {self.type} wants, since their "
            f"rows of {', '.join(map(str, columns))} weights are no multiple of its block: {moves}; "
            f"{extra / 1e6:+.1f} MB, "
            f"{self.bpw:.2f} bits per weight instead of {self.asked_bpw:.2f}"
        )

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        value |= {"path": str(self.path) if self.path else "", "warning": self.warning()}
        value["tensors"] = [asdict(tensor) for tensor in self.tensors]
        value["without_imatrix"] = list(self.without_imatrix)
        return value


def quantize(
    src: Path | str, out: Path | str, type: str, *, imatrix: Path | str | None = None, output_type: str | None = None,
    embedding_type: str | None = None, pure: bool = False, types: Mapping[str, str] | None = None,
    feedback: Sequence[Sequence[int]] | None = None, store: Path | None = None, threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:  # fmt: skip
    """Quantize the f32/f16/bf16 file ``src`` to the llama.cpp type ``type`` and put it at ``out``, whole or not at all.

    ``imatrix`` is a file of ``imatrix.collect``; ``output_type`` and ``embedding_type`` are tensor types for these two
    matrices; ``pure`` gives every matrix the base type; ``types`` gives matrices of its own choice (tensor name: tensor type),
    and ``type`` is then only what the file calls itself. With ``feedback``, token rows of calibration text, weights are
    rounded by what the matrices give on them rather than to the nearest value (``rounding``). Tensors that a file in ``store``, the
    folder of a store, already has are taken from there, and what there is to be found in this one is written beside it
    (``reuse``). The work runs in a process of its own; the result is read back, loaded and decoded once before it gets its
    name. The bytes depend neither on ``threads`` nor on ``store``. Raises UsageError (unknown type, quantized or damaged source,
    missing or foreign imatrix, full disk), StepFailed when llama.cpp fails.
    """
    started = time.monotonic()
    out = Path(out)
    info, plans, missing, entries = _prepare(src, type, imatrix, output_type, embedding_type, pure, types)
    need = sum(plan.nbytes for plan in plans) + info.size - info.tensor_bytes
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < need:
        raise UsageError(
            f"{out}: needs {need / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB free", "free some disk space"
        )
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    kinds = () if feedback is None else FINELY_ROUNDED if types else rounded_in(type)
    by, kept = "", None
    if feedback is not None and store is not None:
        from edgedistill.formats.gguf.rounding import feedback_digest, moments_of

        source = file_digest(info.path)
        by, kept = feedback_digest(source, feedback, kinds), moments_of(store, source, feedback)
    try:
        told = _run_worker(
            info, partial, type, imatrix, output_type, embedding_type, pure, threads, False, progress, types, store=store,
            feedback=by, rounded=kinds,
        )  # fmt: skip
        try:
            result = read_info(partial)
        except UsageError as error:
            raise StepFailed(
                f"the quantizer left a damaged file: {error.message}", "check the disk, then try again"
            ) from None
        if len(result.tensors) != len(info.tensors):
            raise StepFailed(f"{len(result.tensors)} of {len(info.tensors)} tensors were written", "check the disk")
        found = {name: one["errors"] for name, one in told.items() if one.get("found")}
        rounded = None
        if feedback is not None:
            from edgedistill.formats.gguf.rounding import round_file

            rounded = round_file(
                partial, info.path, feedback, types=kinds, scales=kinds == FINELY_ROUNDED, done=found, kept=kept,
                threads=threads, progress=progress,
            )  # fmt: skip
        written = {tensor.name: tensor.type for tensor in result.tensors}
        if wrong := next((name for name, wanted in (types or {}).items() if written.get(name) != wanted), ""):
            raise StepFailed(f"llama.cpp made {wrong} {written.get(wrong)} instead of {(types or {})[wrong]}")
        digest = file_digest(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    if store is not None:
        from edgedistill.formats.gguf.reuse import write_index

        keys = {name: one["key"] for name, one in told.items() if one.get("key")}
        write_index(out, result.tensors, keys, rounded.errors if rounded else {})
    return _report(
        out,
        type,
        plans,
        written,
        info,
        size=result.size,
        sha256=digest,
        missing=missing,
        entries=entries,
        started=started,
        rounding=rounded.to_json() if rounded else None,
        reused=len(found),
    )


def named_after(types: Mapping[str, str]) -> str:
    """Return the file type that a file of such matrices calls itself: llama.cpp has no name for a choice of one's own.

    It is the smallest type whose base most matrices have. One that is not quantized would keep llama.cpp from the rest.
    """
    counts = Counter(types.values())
    for base, _ in counts.most_common():
        named = [name for name, kind in FILE_TYPES.items() if kind.base == base]
        if named and base not in ("F32", "F16", "BF16"):
            return min(named, key=lambda name: FILE_TYPES[name].bpw)
    return "Q8_0"


def dry_run(
    src: Path | str, type: str, *, imatrix: Path | str | None = None, output_type: str | None = None,
    embedding_type: str | None = None, pure: bool = False,
) -> QuantizeReport:  # fmt: skip
    """Say what ``quantize`` would give, from llama.cpp's own dry run (a second, nothing written). Raises as
    ``quantize``.
    """
    started = time.monotonic()
    info, plans, missing, entries = _prepare(src, type, imatrix, output_type, embedding_type, pure)
    told = _run_worker(info, Path(os.devnull), type, imatrix, output_type, embedding_type, pure, None, True, None)
    types = {name: one["type"] for name, one in told.items()}
    return _report(
        None, type, plans, types, info, size=None, sha256="", missing=missing, entries=entries, started=started
    )


def _prepare(
    src: Path | str,
    type: str,
    imatrix: Path | str | None,
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    types: Mapping[str, str] | None = None,
) -> tuple[GgufInfo, list[TensorPlan], tuple[str, ...], int]:
    """Check everything that can be checked before the work; returns source, plan, matrices without imatrix, its
    entries.
    """
    kind = file_type(type)
    for name in (output_type, embedding_type):
        if name is not None:
            ggml_type(name)
    info = read_info(src)
    if not info.tensors:
        raise UsageError(f"{src}: a GGUF without tensors")
    if info.is_quantized:
        raise UsageError(
            f"{src}: already quantized ({info.file_type or 'mixed'}, {info.bpw:.2f} bits per weight); "
            "quantizing twice adds up errors",
            "start from the f16 or bf16 GGUF, or from the Hugging Face folder",
        )
    shapes = {tensor.name: tensor.shape for tensor in info.tensors}
    heads, kv_heads = info.of_arch("attention.head_count", 1), info.of_arch("attention.head_count_kv", 0)
    # Lists in models whose layers differ: llama.cpp's rule then has no single number, and the mix of one head holds.
    gqa = heads // (kv_heads or heads) if isinstance(heads, int) and isinstance(kv_heads, int) else 1
    plans = plan_tensors(
        shapes,
        type,
        gqa=gqa,
        imatrix=imatrix is not None,
        output_type=output_type,
        embedding_type=embedding_type,
        pure=pure,
    )
    if types:
        plans = _chosen(plans, types, src)
    if imatrix is None:
        needy = [plan.name for plan in plans if plan.needs_imatrix]
        if needy:
            raise UsageError(
                f"type {type} needs an importance matrix ({len(needy)} tensors, {needy[0]} first)",
                "pass a calibration set, or choose a type of 3 bits or more",
            )
        return info, plans, (), 0
    from edgedistill.formats.gguf.imatrix import load

    means = load(imatrix)
    for plan in plans:
        columns = plan.shape[-1] * (plan.shape[0] if len(plan.shape) > 2 else 1)  # experts have a row each
        if plan.name in means and means[plan.name].size != columns and plan.name != "token_embd.weight":
            raise UsageError(
                f"{imatrix}: made for another model ({plan.name} has {means[plan.name].size} columns there, "
                f"{columns} here)",
                "collect it again with this model",
            )
    inner = [plan for plan in plans if plan.name.startswith("blk.") and GGML_TYPES[plan.got].block > 1]
    missing = tuple(plan.name for plan in inner if plan.name not in means)
    if kind.imatrix != "no" and inner and len(missing) == len(inner):
        raise UsageError(f"{imatrix}: has no entry for any tensor of {src}", "collect it again with this model")
    needy = [plan.name for plan in plans if plan.needs_imatrix and plan.name in missing]
    if needy:
        raise UsageError(
            f"{imatrix}: has no entry for {needy[0]}, which needs one in {type}", "collect it again with this model"
        )
    return info, plans, missing, len(means)


def _chosen(plans: list[TensorPlan], types: Mapping[str, str], src: Path | str) -> list[TensorPlan]:
    """Return the plans with ``types`` for the matrices that they name. Raises UsageError for one that the file lacks."""
    known = {plan.name: plan for plan in plans}
    for name, type_name in types.items():
        if name not in known:
            raise UsageError(f"{src}: has no matrix {name}: the types were chosen for another model")
        kind, columns = ggml_type(type_name), known[name].shape[-1]
        if columns % kind.block:
            raise UsageError(f"{name}: rows of {columns} do not fit {type_name}", f"choose {fits(type_name, columns)}")
        known[name] = replace(
            known[name], asked=type_name, got=type_name, nbytes=math.prod(known[name].shape[:-1]) * row_bytes(type_name, columns),
            asked_nbytes=math.prod(known[name].shape) * kind.bpw / 8, needs_imatrix=type_name in NEEDS_IMATRIX,
        )  # fmt: skip
    return list(known.values())


def _run_worker(
    info: GgufInfo, out: Path, type: str, imatrix: Path | str | None, output_type: str | None,
    embedding_type: str | None, pure: bool, threads: int | None, dry: bool, progress: Progress | None,
    wanted: Mapping[str, str] | None = None, *, store: Path | None = None, feedback: str = "", rounded: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the worker; returns what it said of each tensor. Raises StepFailed with its own words."""
    request = {
        "src": str(info.path.resolve()), "out": str(out.absolute()), "ftype": file_type(type).number,
        "output_type": GGML_TYPES[output_type].number if output_type else None,
        "embedding_type": GGML_TYPES[embedding_type].number if embedding_type else None,
        "pure": pure, "dry_run": dry, "threads": threads or usable_cpus(),
        "imatrix": str(Path(imatrix).resolve()) if imatrix else None,
        "types": {name: GGML_TYPES[type_name].number for name, type_name in (wanted or {}).items()},
        "store": str(store.absolute()) if store else None, "feedback": feedback, "rounded": list(rounded),
    }  # fmt: skip
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    # A file, not a pipe: a failed assertion prints pages, and nobody reads that pipe meanwhile.
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below, with the pipe)
    worker = subprocess.Popen(
        bound([sys.executable, "-c", _WORKER]),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert worker.stdin and worker.stdout
    told: dict[str, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    try:
        worker.stdin.write(json.dumps(request))
        worker.stdin.close()
        for line in worker.stdout:
            try:
                last = json.loads(line)
            except ValueError:
                continue  # a library's own print
            if "tensor" in last:
                told[last["tensor"]] = last
                if progress:
                    progress(last["done"], last["total"], last["tensor"])
        code = worker.wait()
        errors.seek(0)
        stderr = errors.read()
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
        worker.stdout.close()
        errors.close()
    if last.get("ok"):
        return told
    if code < 0:
        name = signal.Signals(-code).name
        raise StepFailed(
            f"quantizing to {type} was killed by {name}: {stderr.strip()[-300:]}",
            "free some memory, then try again" if name == "SIGKILL" else "edgedistill doctor",
        )
    words = " / ".join([last.get("error", ""), *last.get("log", [])[-2:]]) if last else stderr.strip()[-500:]
    raise StepFailed(f"llama.cpp failed to quantize to {type}: {words}", "check disk and memory, then try again")


def _report(
    out: Path | None, type: str, plans: list[TensorPlan], types: dict[str, str], info: GgufInfo, *, size: int | None,
    sha256: str, missing: tuple[str, ...], entries: int, started: float, rounding: dict[str, Any] | None = None, reused: int = 0,
) -> QuantizeReport:  # fmt: skip
    from edgedistill.formats.gguf.model_io import library_build

    tensors = []
    for plan in plans:
        got = types.get(plan.name, plan.got)
        nbytes = math.prod(plan.shape) // GGML_TYPES[got].block * GGML_TYPES[got].bytes
        # The plan knows dense models; where llama.cpp chose another type that fits, that was its mix and no fallback.
        asked = plan.asked if got == plan.got or plan.shape[-1] % GGML_TYPES[plan.asked].block else got
        fell = got != asked
        tensors.append(
            TensorReport(name=plan.name, shape=plan.shape, asked=asked, got=got, nbytes=nbytes,
                         extra=round(nbytes - plan.asked_nbytes) if fell else 0)
        )  # fmt: skip
    total = sum(tensor.nbytes for tensor in tensors)
    extra = sum(tensor.extra for tensor in tensors)
    build = library_build()
    return QuantizeReport(
        path=out, type=type, size=total if size is None else size, source_size=info.size,
        bpw=8 * total / info.parameters, asked_bpw=8 * (total - extra) / info.parameters, sha256=sha256,
        tensors=tuple(tensors), imatrix_entries=entries, without_imatrix=missing,
        library={key: build[key] for key in ("llama_cpp_python", "llama_cpp", "library_sha256")},
        seconds=time.monotonic() - started, rounding=rounding, reused=reused,
    )  # fmt: skip
