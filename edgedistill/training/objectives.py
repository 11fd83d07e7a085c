"""Which divergences there are, and on which kinds of targets each can be computed. No torch: ``plan`` reads this.

``divergences.py`` computes them; why two of them cannot be estimated from draws stands there.
"""

from __future__ import annotations

from typing import Literal

DivergenceName = Literal["forward-kl", "reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "tv"]
SHARES: dict[str, float] = {"jsd": 0.5, "skew-kl": 0.1, "skew-reverse-kl": 0.1}
"""The divergences against a mixture, with the usual share in it of the distribution that is named first."""
UNSEEN = ("reverse-kl", "tv")
"""Those that draws of the teacher's distribution cannot tell."""
DRAWN = ("sampled", "top-sampled")
"""Kinds of targets whose tail is known by draws alone."""
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
