"""Predict how fast a file of given types runs on a device, from what its kernels cost there (``devices.kernels`` measures them).

A token takes ``fixed + layers * (layer + column * hidden) + sum over the matrices of weight[type] * weights`` seconds. What is
not a matrix product (attention, norms, the start of every operation) is the same for every type. No heavy imports: ``plan`` reads
the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.devices.host import HostFingerprint
from edgedistill.errors import UsageError
from edgedistill.formats.gguf.allocate import Limit
from edgedistill.formats.gguf.types import GGML_TYPES

SCHEMA = 1
MARGIN = 0.05  # of a limit: what a prediction must be above it
TESTS = {"pp512": "pp", "tg128": "tg"}  # a target's limit -> the figures that it is predicted from
Shapes = Mapping[str, Sequence[int]]

_AGAIN = "measure on the device: edgedistill targets kernels -o FILE.json"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds a token, of one test: by weight of a matrix in each type, and of everything else. ``spread`` is the coefficient
    of variation of ``weight`` between rounds.
    """

    weight: Mapping[str, float]
    spread: Mapping[str, float]
    fixed: float
    layer: float
    column: float

    def rest(self, layers: int, hidden: int) -> float:
        """Return the seconds a token that no type changes."""
        return self.fixed + layers * (self.layer + self.column * hidden)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What the kernels of one device cost, how that was measured, and why it is not to be trusted (``noise``; empty: quiet)."""

    threads: int
    host: HostFingerprint
    runner: Mapping[str, str]  # engine, version, commit, build
    settings: Mapping[str, Any]
    costs: Mapping[str, Costs]  # "pp", "tg"
    noise: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the pinned file."""
        return {
            "schema": SCHEMA, "threads": self.threads, "host": self.host.to_json(), "runner": dict(self.runner),
            "settings": dict(self.settings), "unit": "seconds a token", "noise": list(self.noise),
            "costs": {test: asdict(costs) for test, costs in self.costs.items()},
        }  # fmt: skip

    def types(self) -> list[str]:
        """Return the types that were measured."""
        return [name for name in self.costs["pp"].weight if name in self.costs["tg"].weight]


def read_kernels(path: Path) -> Kernels:
    """Read what ``targets kernels`` wrote. Raises UsageError for a file that is missing, or is not one of those."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})", _AGAIN) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise UsageError(f"{path}: no JSON ({error})", _AGAIN) from None
    if not isinstance(data, dict) or "costs" not in data:
        raise UsageError(f"{path}: not a file of kernels' costs", _AGAIN)
    if data.get("schema") != SCHEMA:
        raise UsageError(f"{path}: schema {data.get('schema')!r}, where this version reads {SCHEMA}", _AGAIN)
    try:
        return Kernels(
            threads=int(data["threads"]),
            host=HostFingerprint.from_json(data["host"]),
            runner={str(name): str(value) for name, value in data["runner"].items()},
            settings=dict(data["settings"]),
            costs={test: _costs(data["costs"][test]) for test in TESTS.values()},
            noise=tuple(map(str, data["noise"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{path}: damaged ({told})", _AGAIN) from None


def _costs(data: Any) -> Costs:
    weight = {str(name): float(value) for name, value in data["weight"].items()}
    rest = {name: float(data[name]) for name in ("fixed", "layer", "column")}
    if unknown := sorted(set(weight) - set(GGML_TYPES)):
        raise ValueError(f"{unknown[0]!r} is no type")
    if not weight or not all(math.isfinite(value) and value > 0 for value in weight.values()):
        raise ValueError("a type costs nothing, or no number")
    if not all(math.isfinite(value) and value >= 0 for value in rest.values()):
        raise ValueError("a cost is below zero, or no number")
    return Costs(weight=weight, spread={name: float(data["spread"][name]) for name in weight}, **rest)


# A limit and its figures, as the key of ``allocate`` has them: {"least", "margin", "weight", "fixed", "layer", "column"}.
Figures = Mapping[str, Any]


def figures(limits: Mapping[str, float | None], kernels: Kernels) -> dict[str, Figures]:
    """Return, for the speeds among ``limits`` (pp512, tg128), what ``speed_limit`` and ``predict`` take: plain values."""
    found: dict[str, Figures] = {}
    for name, test in TESTS.items():
        if (least := limits.get(name)) is not None:
            costs = asdict(kernels.costs[test])
            del costs["spread"]
            found[name] = {"least": float(least), "margin": MARGIN, **costs}
    return found


def counted(name: str, shapes: Shapes) -> list[str]:
    """Return the matrices whose products a token takes part in: a prompt's logits are those of its last token alone, so that
    prefill leaves out the head, and an embedding is looked up.
    """
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    matrices = [matrix for matrix, shape in shapes.items() if len(shape) == 2]
    return [matrix for matrix in matrices if matrix.startswith("blk.") or (TESTS[name] == "tg" and matrix == head)]


def rest(of: Figures, shapes: Shapes) -> float:
    """Return the seconds a token that no choice of types changes."""
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=-1)
    hidden = shapes["token_embd.weight"][1]
    return of["fixed"] + layers * (of["layer"] + of["column"] * hidden)


def speed_limit(name: str, of: Figures, shapes: Shapes) -> Limit:
    """Return what ``solve`` keeps to, so that the predicted speed is ``least`` and a margin at least."""
    return Limit(
        what=f"{name} of {of['least']:g} tokens/s",
        of=of["weight"],
        total=1 / (of["least"] * (1 + of["margin"])) - rest(of, shapes),
        among=frozenset(counted(name, shapes)),
        beside=rest(of, shapes),
    )


def predict(name: str, of: Figures, types: Mapping[str, str], shapes: Shapes) -> float:
    """Return the tokens/s of a file with these ``types``."""
    used = sum(of["weight"][types[matrix]] * math.prod(shapes[matrix]) for matrix in counted(name, shapes))
    return 1 / (used + rest(of, shapes))


def fastest(name: str, of: Figures, shapes: Shapes) -> float:
    """Return the tokens/s where every matrix has the fastest type that its rows fit: no file of this model is faster.

    Raises UsageError where no type that was measured fits.
    """
    types = {}
    for matrix in counted(name, shapes):
        fitting = [one for one in of["weight"] if shapes[matrix][1] % GGML_TYPES[one].block == 0]
        if not fitting:
            raise UsageError(f"no type whose speed is known fits {matrix}", _AGAIN)
        types[matrix] = min(fitting, key=of["weight"].__getitem__)
    return predict(name, of, types, shapes)
