"""Choose a type for every matrix: the least predicted KLD within limits on size and speed.

Each matrix takes one type; bytes, seconds a token and predicted KLD are sums over the matrices, so that the choice is a
multiple-choice knapsack. HiGHS solves it as a mixed-integer program through SciPy, to within ``GAP`` of the best.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from edgedistill.formats.gguf.read import GgufInfo

GAP = 1e-3  # of the predicted KLD: predictions are not that good
_SECONDS = 20.0
_ROUNDS = 8
_NOTES = 512  # bytes: what llama.cpp adds to the header of a quantized file

Table = Mapping[str, Mapping[str, Sequence[float]]]
"""{matrix: {type: (bytes, predicted KLD)}}, as ``sensitivity`` writes it."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """``total`` is the most that the sum over the matrices of ``of[type] * weights`` may be, for the types of ``of``.

    Only the matrices ``among`` count where it is given; the others may have any type. ``beside`` is what no type changes, outside
    ``total``: seconds a token, of which a message makes tokens/s.
    """

    what: str
    of: Mapping[str, float]
    total: float
    among: frozenset[str] | None = None
    beside: float = 0.0

    def counts(self, name: str) -> bool:
        """Tell whether a matrix counts."""
        return self.among is None or name in self.among

    def used(self, name: str, type_name: str, shape: Sequence[int]) -> float:
        """Return what a matrix of ``shape`` takes in a type."""
        return self.of[type_name] * shape[0] * shape[1] if self.counts(name) else 0.0


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A type for every matrix, their bytes together and the KLD predicted for all of them."""

    types: dict[str, str]
    nbytes: int
    kld: float
    proved: bool = True  # else time ran out before nothing better was known to exist

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"types": self.types, "nbytes": self.nbytes, "kld": self.kld, "proved": self.proved}


def solve(
    table: Table, nbytes: int, limits: Sequence[Limit] = (), shapes: Mapping[str, Sequence[int]] | None = None
) -> Allocation:
    """Return the best types whose matrices have ``nbytes`` bytes at most and keep the further ``limits``.

    ``shapes`` gives the weights of each matrix, for ``limits``. Raises UsageError where nothing fits, saying which limit, and how
    near the fastest choice comes to it.
    """
    least = sum(min(size for size, _ in types.values()) for types in table.values())
    if least > nbytes:
        raise UsageError(
            f"no choice of types brings the matrices under {nbytes:,} bytes: the smallest has {int(least):,}",
            "raise the limit, or take a smaller model",
        )
    choices = _choices(table, limits, shapes)
    if missing := sorted(set(table) - {one.name for one in choices}):
        raise UsageError(
            f"{missing[0]} has no type whose speed is known",
            "measure more types: edgedistill targets kernels -o FILE.json",
        )
    totals = [float(nbytes), *(limit.total for limit in limits)]
    chosen, late = None, False
    if all(total > 0 for total in totals):
        chosen, late = _search(choices, [one.cost for one in choices], [one.uses for one in choices], totals)
    if chosen is None and late:
        raise UsageError(
            f"no choice of types that keeps all limits was found within {_SECONDS:.0f} s", "loosen one of the limits"
        )
    if chosen is None:
        named = ", ".join(["size", *(limit.what for limit in limits)])
        raise UsageError(
            f"no choice of types keeps all limits at once: {named}{_nearest(choices, limits, totals)}",
            "loosen one of them",
        )
    return Allocation(
        types={one.name: one.type for one in chosen},
        nbytes=int(sum(one.uses[0] for one in chosen)),
        kld=float(sum(one.cost for one in chosen)),
        proved=not late,
    )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """One type for one matrix; ``uses`` are its bytes, and what it takes of each further limit."""

    name: str
    type: str
    cost: float
    uses: tuple[float, ...]

    def better(self, other: _Choice) -> bool:
        """Tell whether this is nowhere more than ``other``, and not the same everywhere."""
        one, two = (self.cost, *self.uses), (other.cost, *other.uses)
        return one != two and all(a <= b for a, b in zip(one, two, strict=True))


def _choices(table: Table, limits: Sequence[Limit], shapes: Mapping[str, Sequence[int]] | None) -> list[_Choice]:
    """Return the types of each matrix that may be chosen: not those that another one is better than in everything."""
    found: list[_Choice] = []
    for name, types in table.items():
        shape = shapes[name] if shapes else ()
        some = [
            _Choice(
                name=name,
                type=type_name,
                cost=cost,
                uses=(size, *(limit.used(name, type_name, shape) for limit in limits)),
            )
            for type_name, (size, cost) in types.items()
            if all(type_name in limit.of or not limit.counts(name) for limit in limits)
        ]
        found += [one for one in some if not any(other.better(one) for other in some)]
    return found


def _search(
    choices: Sequence[_Choice], costs: Sequence[float], uses: Sequence[Sequence[float]], totals: Sequence[float]
) -> tuple[list[_Choice] | None, bool]:
    """Return the cheapest choices, one a matrix, that use ``totals`` at most (None: there are none), and whether time ran out
    before that was proved.

    HiGHS's tolerances are absolute, so costs are scaled by the greatest. What alone costs more than a whole solution is in none
    that is better: it is left out of the next search, until the scale is the solution's own.
    """
    import numpy as np

    best: np.ndarray | None = None
    weights, taken = np.array(costs, dtype=float), np.array(uses, dtype=float).T
    left, late = np.arange(len(choices)), False
    for _ in range(_ROUNDS):
        found, late = _solved([choices[int(at)].name for at in left], weights[left], taken[:, left], np.array(totals))
        if found is None:
            break
        picked = left[found]
        if best is not None and weights[picked].sum() >= weights[best].sum() * (1 - GAP):
            best = min(best, picked, key=lambda some: float(weights[some].sum()))
            break
        best = picked
        kept = left[weights[left] <= weights[best].sum()]
        if late or weights[kept].max() > weights[left].max() / 2:
            break
        left = kept
    return (None if best is None else [choices[int(at)] for at in best]), late


def _solved(names: Sequence[str], weights: np.ndarray, uses: np.ndarray, totals: np.ndarray) -> tuple[Any, bool]:
    """Return the numbers of the choices that HiGHS takes, None where there are none, and whether time ran out."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count = len(names)
    place = {name: at for at, name in enumerate(dict.fromkeys(names))}
    one_each = csr_array((np.ones(count), ([place[name] for name in names], range(count))), shape=(len(place), count))
    for tight in (1.0, 1 - 4e-6):  # HiGHS lets a sum be over its limit by a millionth
        with _away_from_stdout():
            found = milp(
                weights / max(float(weights.max()), 1e-300),
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(uses / totals[:, None], -np.inf, tight),
                ],
                options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
            )
        if found.x is None:
            return None, found.status == 1
        picked = np.flatnonzero(found.x > 0.5)
        if (uses[:, picked].sum(axis=1) <= totals * (1 + 1e-12)).all():
            return picked, found.status == 1
    return None, False


@contextmanager
def _away_from_stdout() -> Iterator[None]:
    """Let what HiGHS prints go to standard error: standard output is the command's."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _nearest(choices: Sequence[_Choice], limits: Sequence[Limit], totals: Sequence[float]) -> str:
    """Say how fast a file of the size could be, by each limit alone."""
    told = []
    for at, limit in enumerate(limits, 1):
        quickest, _ = _search(choices, [one.uses[at] for one in choices], [one.uses[:1] for one in choices], totals[:1])
        if quickest is not None and limit.beside + limit.total > 0:
            best = 1 / (sum(one.uses[at] for one in quickest) + limit.beside)
            need = 1 / (limit.beside + limit.total)
            told.append(
                f"{limit.what}: the fastest choice of that size is predicted at {best:.4g}, and {need:.4g} is needed"
            )
    return "".join(f"; {one}" for one in told)


def overhead(info: GgufInfo, table: Table) -> int:
    """Return the bytes that a file has beside the matrices of ``table``: header, vectors, what aligns tensors."""
    ours = sum(tensor.nbytes for tensor in info.tensors if tensor.name in table)
    alignment = int(info.metadata.get("general.alignment", 32))
    return info.size - ours + alignment * len(info.tensors) + _NOTES


def front(table: Table, points: int = 12) -> list[Allocation]:
    """Return the best choices for ``points`` sizes between the smallest and the largest that a table has."""
    sizes = [[size for size, _ in types.values()] for types in table.values()]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    found: list[Allocation] = []
    for at in range(points):
        with suppress(UsageError):  # no answer in time: the front has a point less
            found.append(solve(table, round(least * (most / least) ** (at / (points - 1)))))
    return [one for at, one in enumerate(found) if not at or one.nbytes > found[at - 1].nbytes]


def groups(allocation: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, str, int, int]]:
    """Return (part, type, matrices, weights) of an allocation: parts of layers together, as a person reads it."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, type_name in allocation.items():
        parts = name.split(".")
        part = parts[2] if parts[0] == "blk" else parts[0]
        found.setdefault((part, type_name), []).append(shapes[name][0] * shapes[name][1])
    return [(part, type_name, len(some), sum(some)) for (part, type_name), some in sorted(found.items())]
