"""Which divergences there are, and on which kinds of targets each can be computed; which hidden states are compared, and how.
No torch: ``plan`` reads this.

``divergences.py`` computes them; why two of them cannot be estimated from draws stands there. ``features.py`` compares states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DivergenceName = Literal["forward-kl", "reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "tv", "uld", "gold"]
SHARES: dict[str, float] = {"jsd": 0.5, "skew-kl": 0.1, "skew-reverse-kl": 0.1}
"""The divergences against a mixture, with the usual share in it of the distribution that is named first."""
UNSEEN = ("reverse-kl", "tv")
"""Those that draws of the teacher's distribution cannot tell."""
WHOLE = ("uld", "gold")
"""Those that need both distributions whole: they compare by rank, and so teacher and student may have different tokens."""
DRAWN = ("sampled", "top-sampled")
"""Kinds of targets whose tail is known by draws alone."""
REACH = 0.5
"""How far in temperature a sampled target can be re-weighted (measured; beyond it the variance grows several times)."""
TEMPERATURES = (0.5, 2 / 3, 4 / 3, 2.0, 4.0)
"""Whose normalisers are stored with every position, beside that of 1. Powers of sqrt(p): one square root each instead of a
power over the whole vocabulary."""


def temperature_known(temperature: float) -> bool:
    """Tell whether the teacher's probabilities at this temperature follow from what is stored."""
    return any(abs(temperature - known) < 1e-4 for known in (1.0, *TEMPERATURES))


def problem(divergence: str, share: float | None, kind: str, temperature: float) -> tuple[str, str] | None:
    """Say why a divergence cannot be computed on targets of this kind, and what to do; None where it can."""
    if share is not None and divergence not in SHARES:
        return f"{divergence!r} has no mixture, and so no share", f"share is for {', '.join(SHARES)}"
    if share is not None and not 0 < share < 1:
        return (
            f"a share of {share:g} is not between 0 and 1",
            f"the usual one of {divergence} is {SHARES[divergence]:g}",
        )
    if kind not in ("", "dense") and divergence in WHOLE:
        return (
            f"{divergence!r} sorts the teacher's whole distribution, and score.kind = {kind!r} does not keep it",
            "set score.kind = 'dense'",
        )
    if kind in DRAWN and divergence in UNSEEN:
        return (
            f"{divergence!r} cannot be estimated from draws of the teacher's distribution: they tell nothing of what the "
            "teacher never says, where it has its weight",
            "set score.kind = 'top-k', or divergence = 'forward-kl'",
        )
    if divergence != "forward-kl" and kind in DRAWN and not temperature_known(temperature):
        known = ", ".join(f"{one:.4g}" for one in sorted((1.0, *TEMPERATURES)))
        return (
            f"{divergence!r} needs the teacher's probabilities at temperature {temperature:g}; draws keep those at {known}",
            "use one of these temperatures, or divergence = 'forward-kl'",
        )
    return None


@dataclass(frozen=True, kw_only=True)
class FeatureTerms:
    """What is compared of the hidden states of teacher and student, and what each term weighs; 0: it is left out.

    ``pairs`` are (layer of the teacher, layer of the student), counted from 0; None: ``even_pairs``. ``distance`` is that of
    two states. With ``project`` the student's pass through a matrix in training where the widths agree, too.
    """

    weight: float = 1.0
    pairs: tuple[tuple[int, int], ...] | None = None
    distance: Literal["mse", "cosine"] = "mse"
    project: bool = False
    distances: float = 0.0
    angles: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights of the terms that are used, by their names in the log."""
        every = {"features": self.weight, "distances": self.distances, "angles": self.angles}
        return {name: weight for name, weight in every.items() if weight}


def even_pairs(teacher: int, student: int) -> tuple[tuple[int, int], ...]:
    """Pair every layer of a student with one of its teacher, evenly spaced, last with last: after the same share of the
    layers, the same share of the work is done (24 and 12 layers: 1 and 0, 3 and 1, … 23 and 11).
    """
    return tuple((max(0, round((at + 1) * teacher / student) - 1), at) for at in range(student))
