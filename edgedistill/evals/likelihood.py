"""Likelihoods: perplexity of the references, and how far a model's distributions are from another's on the same tokens.

All of it is taken at the positions of the answers (reference and end token), row by row: a distribution over 49k tokens
is 200 kB, so no table of them is ever held. Tokens of one row depend on each other, so intervals treat rows as the
sample.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.calibration import Calibration, RowConfidence, calibration, confidence
from edgedistill.evals.runners.base import Progress, Runner
from edgedistill.evals.statistics import Estimate, clustered_mean, clustered_proportion

LOST = 0.5
"""Share of ``lost_kld`` above which a model is held for another one: what a coarse type costs depends on the model, and quality is
for the recipe's gates, so only a model that has lost the text is refused.
"""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Hold one row as token ids: prompt, reference, end token. ``start`` is the length of the prompt."""

    id: str
    ids: tuple[int, ...]
    start: int

    @property
    def positions(self) -> range:
        """Return the positions whose next token belongs to the answer."""
        return range(self.start - 1, len(self.ids) - 1)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Hold perplexity and negative log-likelihood (nats a token); ``sums`` and ``counts`` are per row, for pairing."""

    perplexity: Estimate
    nll: Estimate
    standard_error: float
    tokens: int
    ids: tuple[str, ...]
    sums: tuple[float, ...]
    counts: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the perplexity's estimate (value, low, high, n) and what belongs to it, no per-row numbers."""
        return {
            **self.perplexity.to_json(),
            "nll": self.nll.to_json(),
            "standard_error": self.standard_error,
            "tokens": self.tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Hold how far a model is from its reference: KLD in nats a token, and the share of equal first choices; and how sure each
    of the two is on the same text.
    """

    kld: Estimate
    standard_error: float
    p50: float
    p99: float
    max: float
    top1: Estimate
    tokens: int
    rows: int
    candidate: Calibration
    reference: Calibration

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {
            "kld": self.kld.to_json(),
            "standard_error": self.standard_error,
            "p50": self.p50,
            "p99": self.p99,
            "max": self.max,
            "top1": self.top1.to_json(),
            "tokens": self.tokens,
            "rows": self.rows,
            "calibration": {"candidate": self.candidate.to_json(), "reference": self.reference.to_json()},
        }


def token_rows(runner: Runner, rows: Sequence[Row]) -> list[TokenRow]:
    """Encode rows with their references by the runner's tokenizer. Raises UsageError for a row without a reference."""
    out = []
    for row in rows:
        if row.reference is None:
            raise UsageError(f"row {row.id!r} has no reference, and likelihoods are taken over references", "Add one.")
        prompt = runner.encode(row)
        answer = [*runner.encode_text(row.reference), runner.end_token()]
        out.append(TokenRow(id=row.id, ids=(*prompt, *answer), start=len(prompt)))
    return out


def perplexity(runner: Runner, rows: Sequence[Row], *, progress: Progress | None = None) -> Likelihood:
    """Measure the perplexity of the rows' references (end token included) given their prompts."""
    encoded = token_rows(runner, rows)
    if not encoded:
        raise UsageError("perplexity: no rows", "Name a file with rows that have references.")
    sums: list[float] = []
    counts: list[int] = []
    found = runner.logprobs([row.ids for row in encoded], [row.positions for row in encoded])
    for row, logprobs in zip(encoded, found, strict=True):
        targets = np.asarray(row.ids[row.start :])
        sums.append(float(-logprobs[np.arange(len(targets)), targets].sum(dtype=np.float64)))
        counts.append(len(targets))
        if progress is not None:
            progress(len(sums), len(encoded), "likelihoods")
    return likelihood_of([row.id for row in encoded], sums, counts)


def likelihood_of(ids: Sequence[str], sums: Sequence[float], counts: Sequence[int]) -> Likelihood:
    """Put per-row sums of negative log-likelihood together. Raises StepFailed where one is not finite."""
    for identity, value in zip(ids, sums, strict=True):
        if not math.isfinite(value):
            raise StepFailed(
                f"row {identity!r}: the model gives its reference no probability (log-likelihood {value})",
                "The model is damaged (NaN weights?): build it again, or check the file.",
            )
    nll, error = clustered_mean(sums, counts)
    # exp is monotone, so the interval of the mean maps to one of the perplexity.
    ppl = Estimate(
        value=_exp(nll.value), low=_exp(nll.low), high=_exp(nll.high), n=nll.n, method=f"exp of {nll.method}"
    )
    return Likelihood(
        perplexity=ppl,
        nll=nll,
        standard_error=error,
        tokens=sum(counts),
        ids=tuple(ids),
        sums=tuple(sums),
        counts=tuple(counts),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def text_divergence(
    candidate: Runner,
    reference: Runner,
    texts: Sequence[tuple[Sequence[int], int]],
    *,
    progress: Progress | None = None,
) -> tuple[Estimate, int]:
    """Return KL(reference || candidate), nats a token, over ``texts``: token ids, and from which of them on it counts; and how many
    tokens counted.
    """
    ids = [tuple(row) for row, _ in texts]
    positions = [range(start - 1, len(row) - 1) for row, start in texts]
    sums: list[float] = []
    counts: list[int] = []
    pairs = zip(reference.logprobs(ids, positions), candidate.logprobs(ids, positions), strict=True)
    for done, (whole, other) in enumerate(pairs, 1):
        each, _ = kl_divergence(whole, other)
        sums.append(float(each.sum()))
        counts.append(len(each))
        if progress is not None:
            progress(done, len(ids), "divergence")
    return clustered_mean(sums, counts)[0], sum(counts)


def divergence(
    candidate: Runner, reference: Runner, rows: Sequence[Row], *, progress: Progress | None = None
) -> Divergence:
    """Measure KL(reference || candidate) and top-1 agreement at the answer positions of ``rows``; see ``divergences``."""
    return divergences(candidate, {"reference": reference}, rows, progress=progress)["reference"]


def divergences(
    candidate: Runner,
    references: Mapping[str, Runner],
    rows: Sequence[Row],
    *,
    unlike: Collection[str] = (),
    progress: Progress | None = None,
) -> dict[str, Divergence]:
    """Measure KL(reference || candidate) and top-1 agreement at the answer positions of ``rows``, for each reference.

    All models read the same tokens; the candidate reads them once for all references. A candidate with a part of the
    reference's vocabulary (a trimmed one) is compared on the rows that both cut alike and over the tokens that both have,
    the reference's probabilities normalised over them; a first choice that the candidate lacks is no agreement. A
    reference that cuts every row otherwise is left out of the answer; all of them, and that is refused. ``unlike`` names
    the references that may have another tokenizer altogether: they are left out where they do, be it all of them.
    Raises UsageError where another reference cuts a row otherwise and does not hold the candidate's tokens (then no
    token's distributions compare), StepFailed where a distribution is not finite.
    """
    own = token_rows(candidate, rows)
    if not own:
        raise UsageError("divergence: no rows", "Name a file with rows that have references.")
    others = {name: token_rows(reference, rows) for name, reference in references.items()}
    columns: dict[str, np.ndarray | None] = {}
    for name, other in others.items():
        try:
            columns[name] = shared_columns(candidate, own, references[name], other)
        except UsageError:
            if name not in unlike:
                raise
    shared = {
        name: {at for at in range(len(own)) if cut_alike(own[at], others[name][at], of)} for name, of in columns.items()
    }
    kept = [name for name in columns if shared[name]]
    if not kept and all(name in unlike for name in references):
        return {}
    references = {name: references[name] for name in kept}
    alike = sorted(set.intersection(*(shared[name] for name in kept))) if kept else []
    if not alike:
        raise UsageError(
            "divergence: the two models cut every row into different tokens",
            "KLD compares models on the same tokens; compare scores instead.",
        )
    own = [own[at] for at in alike]
    ids, positions = [row.ids for row in own], [row.positions for row in own]
    klds: dict[str, list[np.ndarray]] = {name: [] for name in references}
    agree: dict[str, list[float]] = {name: [] for name in references}
    sure: list[RowConfidence] = []
    theirs: dict[str, list[RowConfidence]] = {name: [] for name in references}
    every = (
        reference.logprobs([others[name][at].ids for at in alike], positions) for name, reference in references.items()
    )
    for done, (row, found, *wanted) in enumerate(zip(own, candidate.logprobs(ids, positions), *every, strict=True), 1):
        for name, one in zip(references, wanted, strict=True):
            each, same = kl_divergence(one, found, columns=columns[name])
            if not np.all(np.isfinite(each)):
                raise StepFailed(
                    f"row {row.id!r}: a distribution is not finite",
                    "One model is damaged (NaN weights?): build it again.",
                )
            klds[name].append(each)
            agree[name].append(float(same.sum()))
            theirs[name].append(confidence(one, others[name][alike[done - 1]].ids[row.start :]))
        sure.append(confidence(found, row.ids[row.start :]))
        if progress is not None:
            progress(done, len(own), "divergence")
    own_calibration = calibration(sure)
    return {name: _summed(klds[name], agree[name], own_calibration, calibration(theirs[name])) for name in references}


def shared_columns(
    candidate: Runner, own: Sequence[TokenRow], reference: Runner, other: Sequence[TokenRow]
) -> np.ndarray | None:
    """Return the reference's number of each of the candidate's tokens (-1: padding); None where the numbers are the same.

    Raises UsageError where the candidate has tokens that the reference lacks.
    """
    differs = next(((a, b) for a, b in zip(own, other, strict=True) if a.ids != b.ids), None)
    if differs is None:
        return None
    pieces, numbers = candidate.pieces(), {piece: at for at, piece in enumerate(reference.pieces())}
    if any(piece not in numbers and not piece.startswith("[PAD") for piece in pieces):
        raise UsageError(
            f"row {differs[0].id!r}: the two models cut it into different tokens "
            f"({len(differs[0].ids)} and {len(differs[1].ids)})",
            "KLD compares models with one tokenizer and one chat template; compare scores instead.",
        )
    return np.asarray([numbers.get(piece, -1) for piece in pieces])


def cut_alike(own: TokenRow, other: TokenRow, columns: np.ndarray | None) -> bool:
    """Tell whether both models cut a row into the same tokens, by the numbers of ``shared_columns``."""
    return columns is None or (own.start == other.start and tuple(columns[list(own.ids)].tolist()) == other.ids)


def _summed(
    klds: Sequence[np.ndarray], agree: Sequence[float], candidate: Calibration, reference: Calibration
) -> Divergence:
    counts = [len(each) for each in klds]
    every = np.concatenate(klds)
    kld, error = clustered_mean([float(each.sum()) for each in klds], counts)
    return Divergence(
        kld=kld,
        standard_error=error,
        p50=float(np.quantile(every, 0.5)),
        p99=float(np.quantile(every, 0.99)),
        max=float(every.max()),
        top1=clustered_proportion(agree, counts),
        tokens=int(every.size),
        rows=len(klds),
        candidate=candidate,
        reference=reference,
    )


def compare_distributions(
    candidate: Runner,
    references: Mapping[str, Path],
    rows: Sequence[Row],
    *,
    store: Path,
    unlike: Collection[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Divergence]:
    """Measure ``divergences`` from GGUF files, opened and closed here; what they say is kept in the ``store``'s folder."""
    from edgedistill.evals.runners.kept import KeptRunner

    with ExitStack() as opened:
        runners = {
            name: opened.enter_context(KeptRunner(path, root=store, threads=threads))
            for name, path in references.items()
        }
        return divergences(candidate, runners, rows, unlike=unlike, progress=progress)


def kl_divergence(p: np.ndarray, q: np.ndarray, *, columns: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(p || q) in nats, float64 [positions], and whether the first choices agree, bool [positions].

    ``p`` and ``q`` are log-probabilities [positions, vocabulary]. Families pad vocabularies differently: the longer one
    is cut to the shorter and normalised again. ``columns`` gives the column of ``p`` that belongs to each of ``q``, where
    q's vocabulary is a part of p's; both are normalised over the tokens that they share.
    """
    same = None
    if columns is not None:
        shared = np.flatnonzero(columns >= 0)
        same = columns[q.argmax(axis=1)] == p.argmax(axis=1)
        p, q = _normalised(p[:, columns[shared]]), _normalised(q[:, shared])
    elif p.shape[1] != q.shape[1]:
        size = min(p.shape[1], q.shape[1])
        p, q = _normalised(p[:, :size]), _normalised(q[:, :size])
    # Rounding can push a divergence of equal distributions a hair below zero.
    each = np.maximum(np.sum(np.exp(p) * (p - q), axis=1, dtype=np.float64), 0.0)
    return each, p.argmax(axis=1) == q.argmax(axis=1) if same is None else same


def lost_kld(logprobs: np.ndarray) -> float:
    """Return the KLD, in nats a token, of a model that answers every position with the distribution of another one.

    ``logprobs`` [positions, vocabulary]: what is that far from them has lost the text.
    """
    return float(kl_divergence(logprobs, np.roll(logprobs, len(logprobs) // 2, axis=0))[0].mean())


def _normalised(logprobs: np.ndarray) -> np.ndarray:
    total = np.log(np.exp(logprobs).sum(axis=1, dtype=np.float64, keepdims=True))
    return logprobs - total.astype(np.float32)
