"""Choose a type for every matrix: the least predicted KLD within limits on size and speed.

Each matrix takes one type; bytes, seconds a token and predicted KLD are sums over the matrices, so that the choice is a
multiple-choice knapsack. HiGHS solves it as a mixed-integer program through SciPy, to within ``GAP`` of the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    from edgedistill.formats.gguf.read import GgufInfo

GAP = 1e-3  # of the predicted KLD: predictions are not that good
_SECONDS = 20.0
_NOTES = 512  # bytes: what llama.cpp adds to the header of a quantized file

Table = Mapping[str, Mapping[str, Sequence[float]]]
"""{matrix: {type: (bytes, predicted KLD)}}, as ``sensitivity`` writes it."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """``total`` is the most that the sum over the matrices of ``of[type] * weights`` may be, for the types of ``of``."""

    what: str
    of: Mapping[str, float]
    total: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A type for every matrix, their bytes together and the KLD predicted for all of them."""

    types: dict[str, str]
    nbytes: int
    kld: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"types": self.types, "nbytes": self.nbytes, "kld": self.kld}


def solve(
    table: Table, nbytes: int, limits: Sequence[Limit] = (), shapes: Mapping[str, Sequence[int]] | None = None
) -> Allocation:
    """Return the best types whose matrices have ``nbytes`` bytes at most and keep the further ``limits``.

    ``shapes`` gives the weights of each matrix, for ``limits``. Raises UsageError where nothing fits, saying which limit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = sum(min(size for size, _ in types.values()) for types in table.values())
    if least > nbytes:
        raise UsageError(
            f"no choice of types brings the matrices under {nbytes:,} bytes: the smallest has {int(least):,}",
            "raise the limit, or take a smaller model",
        )
    # Without other limits a type that is no smaller and no better than another one is never chosen.
    choices = [
        (name, type_name, size, cost)
        for name, types in table.items()
        for type_name, (size, cost) in types.items()
        if all(not limit.of or type_name in limit.of for limit in limits)
        and (limits or not any(_better(other, (size, cost)) for other in types.values()))
    ]
    names = list(table)
    if missing := sorted(set(names) - {name for name, *_ in choices}):
        raise UsageError(
            f"{missing[0]} has no type whose speed is known", "measure more types: edgedistill targets detect"
        )
    place = {name: at for at, name in enumerate(names)}
    count = len(choices)
    one_each = csr_array(
        (np.ones(count), ([place[name] for name, *_ in choices], range(count))), shape=(len(names), count)
    )
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(np.array([[size for *_, size, _ in choices]]) / nbytes, -np.inf, 1),
    ]
    for limit in limits:
        assert shapes is not None
        used = [limit.of[type_name] * shapes[name][0] * shapes[name][1] for name, type_name, *_ in choices]
        constraints.append(LinearConstraint(np.array([used]) / limit.total, -np.inf, 1))
    cost = np.array([cost for *_, cost in choices])
    found = milp(
        cost / max(float(cost.max()), 1e-30),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise UsageError(
            "no choice of types keeps all limits at once: " + ", ".join(["size", *(limit.what for limit in limits)]),
            "loosen one of them",
        )
    chosen = [choices[at] for at in np.flatnonzero(found.x > 0.5)]
    return Allocation(
        types={name: type_name for name, type_name, *_ in chosen},
        nbytes=int(sum(size for *_, size, _ in chosen)),
        kld=float(sum(cost for *_, cost in chosen)),
    )


def _better(one: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether a type is no larger and no worse than another, and not the same in both."""
    return one[0] <= other[0] and one[1] <= other[1] and tuple(one) != tuple(other)


def overhead(info: GgufInfo, table: Table) -> int:
    """Return the bytes that a file has beside the matrices of ``table``: header, vectors, what aligns tensors."""
    ours = sum(tensor.nbytes for tensor in info.tensors if tensor.name in table)
    alignment = int(info.metadata.get("general.alignment", 32))
    return info.size - ours + alignment * len(info.tensors) + _NOTES


def front(table: Table, points: int = 12) -> list[Allocation]:
    """Return the best choices for ``points`` sizes between the smallest and the largest that a table has."""
    sizes = [[size for size, _ in types.values()] for types in table.values()]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    found = [solve(table, round(least * (most / least) ** (at / (points - 1)))) for at in range(points)]
    return [one for at, one in enumerate(found) if not at or one.nbytes > found[at - 1].nbytes]


def groups(allocation: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, str, int, int]]:
    """Return (part, type, matrices, weights) of an allocation: parts of layers together, as a person reads it."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, type_name in allocation.items():
        parts = name.split(".")
        part = parts[2] if parts[0] == "blk" else parts[0]
        found.setdefault((part, type_name), []).append(shapes[name][0] * shapes[name][1])
    return [(part, type_name, len(some), sum(some)) for (part, type_name), some in sorted(found.items())]
