"""What can be refused of a target's own choice of types before anything runs: sizes and speeds that nothing reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedistill.errors import RecipeError, UsageError
from edgedistill.formats.gguf.speeds import Kernels, fastest, figures, read_kernels
from edgedistill.formats.gguf.types import estimate_file_size, smallest_choice, smallest_type, tensor_shapes
from edgedistill.formats.onnx.types import refuse_blocks, smallest
from edgedistill.plan import package_version
from edgedistill.target import AUTO, Target, format_size, matches_host


def refuse_auto(target: Target, who: str, config: Mapping[str, Any]) -> list[str]:
    """Raise RecipeError where no choice of types keeps to the target's size, or to one of its speeds; return warnings."""
    limit, least = target.auto_size, smallest_choice(config)
    if limit is not None and least > limit:
        raise RecipeError(
            f"no type brings {who} under {format_size(limit)}: the smallest choice makes about {format_size(least)}",
            "take fewer layers or a smaller student, or raise the limit",
            file=target.path,
            key="quantize.size" if limit == target.quantize.size else "limits.file_size",
        )
    kernels = kernels_of(target)
    if kernels is None:
        return _unheeded(target, heeded=False)
    shapes = tensor_shapes(config)
    for name, of in figures(target.limits.model_dump(), kernels).items():
        best, needed = fastest(name, of, shapes), of["least"] * (1 + of["margin"])
        if best < needed:
            raise RecipeError(
                f"no choice of types brings {who} to {of['least']:g} tokens/s: {best:.4g} is predicted of the fastest, and "
                f"{needed:.4g} is needed with a margin of {of['margin']:.0%}",
                "take fewer layers or a smaller student, or lower the limit",
                file=target.path,
                key=f"limits.{name}",
            )
    return [*_doubts(target, kernels), *_unheeded(target, heeded=True)]


def refuse_size(target: Target, who: str, config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Raise RecipeError for a GGUF target's size that no type can meet; return about the bytes of its own type, and warnings."""
    limit, types = target.limits.file_size, target.quantize
    options = {"embedding_type": types.embedding_type, "output_type": types.output_type}
    size = estimate_file_size(config, None, types.type, imatrix=types.imatrix, **options)
    if limit is None or size <= limit:
        return size, []
    best, least = smallest_type(config)
    if least > limit:
        raise RecipeError(
            f"no type brings {who} under {format_size(limit)}: the smallest, {best}, makes about {format_size(least)}",
            "take fewer layers or a smaller student, or raise the limit",
            file=target.path,
            key="limits.file_size",
        )
    return size, [f"{types.type} makes about {format_size(size)}, over its file_size of {format_size(limit)}"]


def refuse_onnx(target: Target, who: str, config: Mapping[str, Any]) -> list[str]:
    """Raise RecipeError where the builder cannot make an ONNX target's type of a model, or no kind of matrix is small enough;
    return warnings.
    """
    types = target.quantize
    if types.type == "mixed":
        try:
            refuse_blocks(config, types.block)
        except UsageError as error:
            raise RecipeError(error.message, error.hint, file=target.path, key="quantize.type") from None
    if types.type != AUTO:
        return []
    limit, least = target.auto_size, smallest(config)
    if limit is not None and least > limit:
        raise RecipeError(
            f"no type brings {who} under {format_size(limit)}: the smallest choice makes about {format_size(least)}",
            "take fewer layers or a smaller student, or raise the limit",
            file=target.path,
            key="quantize.size" if limit == types.size else "limits.file_size",
        )
    return _unheeded(target, heeded=False)


def kernels_of(target: Target) -> Kernels | None:
    """Return the costs in the file that a profile names; None where it names none. Raises RecipeError for a file that is none, and
    for costs of another number of threads.
    """
    path = target.kernels_path
    if path is None:
        return None
    try:
        kernels = read_kernels(path)
    except UsageError as error:
        raise RecipeError(error.message, error.hint, file=target.path, key="runtime.kernels") from None
    if kernels.threads != target.runtime.threads:
        raise RecipeError(
            f"{path}: measured with {kernels.threads} threads, and the target runs {target.runtime.threads}",
            f"edgedistill targets kernels -o {path} --threads {target.runtime.threads}",
            file=target.path,
            key="runtime.kernels",
        )
    return kernels


def speeds_of(target: Target) -> dict[str, Any] | None:
    """Return what ``allocate`` keeps to beside the size: figures of the target's speeds; None where nothing is known of them."""
    kernels = kernels_of(target) if target.quantize.type == AUTO else None
    return (figures(target.limits.model_dump(), kernels) or None) if kernels else None


def _doubts(target: Target, kernels: Kernels) -> list[str]:
    """Say why the costs may not be those of the target, or of what will be run."""
    if target.limits.pp512 is None and target.limits.tg128 is None:
        return []
    path, found = target.kernels_path, []
    same, why = matches_host(target, kernels.host)
    if not same:
        found.append(f"{path}: {why}")
    ours = f"llama-cpp-python {package_version('llama-cpp-python')}"
    if kernels.runner.get("version") != ours:
        found.append(f"{path}: kernels of {kernels.runner.get('version', 'an unknown build')}, and this is {ours}")
    return [*found, *(f"{path}: measured on a noisy machine: {reason}" for reason in kernels.noise)]


def _unheeded(target: Target, *, heeded: bool) -> list[str]:
    """Say which limits "auto" does not look at: they are measured, and a miss is a miss. ``heeded``: speeds are looked at."""
    speeds = () if heeded else ("pp512", "tg128")
    names = [name for name in (*speeds, "peak_rss", "ttft_p95_ms") if getattr(target.limits, name) is not None]
    if not names:
        return []
    told = f'type = "auto" does not look at {", ".join(names)}: measuring tells whether they hold'
    if target.runtime.format == "gguf" and any(name in names for name in speeds):
        told += " (to choose by speed: edgedistill targets kernels, and runtime.kernels in the profile)"
    return [told]
