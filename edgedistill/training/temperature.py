"""One temperature for all that a student says, fitted and folded into its final norm (Guo et al. 2017, arXiv:1706.04599).

A student that was trained to its end is surer than it is right. Dividing its logits by one number T changes no answer of greedy
decoding, and makes its probabilities mean what they say: what is sampled, filtered by confidence or distilled further profits.
The logits are a product of the head and of the final norm's output, so 1 / T is folded into that norm's gain: exact, and every
runtime and container keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.calibration import Calibration, calibration, confidence
from edgedistill.training.data import Example
from edgedistill.training.packing import body, completion_states, make_batch, packed_mode
from edgedistill.training.precision import pick_device

BOUNDS = (0.25, 4.0)
"""Temperatures beyond these say that rows and student do not belong together."""
CHUNK = 256  # tokens whose logits are held at once, some times over: 50 MB each in float32 for a vocabulary of 49k
ROWS = 8
LEAST_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A temperature, fitted on half of the rows, and what it does on the other half."""

    temperature: float
    fitted_rows: int
    before: Calibration
    after: Calibration

    @property
    def helped(self) -> bool:
        """Tell whether rows that it was not fitted on are more probable with it."""
        return self.after.nll.value < self.before.nll.value

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "temperature": self.temperature,
            "fitted_rows": self.fitted_rows,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "helped": self.helped,
        }


def fit(
    model: Any,
    examples: Sequence[Example],
    *,
    vocab_size: int,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Fitted:
    """Fit one temperature by the likelihood of every other row's completion, and compare on the rest.

    Raises UsageError for fewer than 20 rows.
    """
    if len(examples) < LEAST_ROWS:
        raise UsageError(
            f"{len(examples)} rows are too few to fit a temperature on", f"give temperature.files at least {LEAST_ROWS}"
        )
    head = model.get_output_embeddings()
    weight = head.weight.detach()[:vocab_size].float()
    halves = [_states(model, examples[first::2], progress) for first in (0, 1)]
    temperature = 1 / fit_scale(weight, *halves[0][:2])
    before, after = (measure(weight, *halves[1], scale=scale) for scale in (1.0, 1 / temperature))
    return Fitted(temperature=temperature, fitted_rows=len(examples[0::2]), before=before, after=after)


def fit_scale(weight: torch.Tensor, states: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the factor of the logits ``states @ weight.T`` under which ``labels`` are most probable, within `BOUNDS`.

    The likelihood is convex in it: Newton's steps, and halves of the bracket where one would leave it.
    """
    low, high = 1 / BOUNDS[1], 1 / BOUNDS[0]
    scale = 1.0
    for _ in range(60):
        slope = curvature = 0.0
        for logits, label in _logits(weight, states, labels):
            log_p = torch.log_softmax(scale * logits, dim=-1)
            p = log_p.exp()
            mean = (p * logits).sum(-1)
            slope += float((mean - logits.gather(1, label[:, None])[:, 0]).sum())
            curvature += float(((p * logits**2).sum(-1) - mean**2).sum())
        low, high = (low, scale) if slope > 0 else (scale, high)
        new = scale - slope / curvature if curvature > 0 else (low if slope > 0 else high)
        if not low <= new <= high:
            new = (low + high) / 2
        if abs(new - scale) < 1e-6 * scale:
            break
        scale = new
    return scale


def measure(
    weight: torch.Tensor, states: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, *, scale: float
) -> Calibration:
    """Measure logits ``scale * states @ weight.T`` against ``labels``; ``rows`` is the row of each token, from 0, ascending."""
    counts = torch.bincount(rows).tolist()
    found = []
    for state, label in zip(states.split(counts), labels.split(counts), strict=True):
        logits = scale * (state @ weight.T.to(state.device))
        found.append(confidence(torch.log_softmax(logits, dim=-1).cpu().numpy(), label.tolist()))
    return calibration(found)


def fold(model: Any, temperature: float) -> None:
    """Divide the logits of a causal LM by ``temperature``, in place, through the gain of its final norm.

    Raises UsageError for a model whose logits are no plain product of head and final norm.
    """
    norm: Any = getattr(body(model), "norm", None)
    head = model.get_output_embeddings()
    if getattr(norm, "weight", None) is None or head.bias is not None or getattr(norm, "bias", None) is not None:
        raise UsageError(
            f"a temperature cannot be folded into a model of type {model.config.model_type!r}",
            "leave [temperature] out",
        )
    offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0  # Gemma's gain is 1 + weight
    with torch.no_grad():
        norm.weight.copy_((norm.weight + offset) / temperature - offset)


def check_folded(before: torch.Tensor, after: torch.Tensor, temperature: float) -> float:
    """Return the largest difference of logits from what was meant, over their spread; raise StepFailed above 1e-4."""
    wanted = before / temperature
    difference = float((after - wanted).abs().max() / wanted.std())
    if not difference < 1e-4:
        raise StepFailed(
            f"the folded temperature moved logits by {difference:.2g} of their spread", "leave [temperature] out"
        )
    return difference


def _states(
    model: Any, examples: Sequence[Example], progress: Callable[[int, int, str], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (states [tokens, H], labels [tokens], row of each token) of the completions, in float32."""
    device = pick_device()
    model.to(device).eval()
    states, labels, rows = [], [], []
    with torch.no_grad(), packed_mode(model) as packed:
        for start in range(0, len(examples), ROWS):
            part = examples[start : start + ROWS]
            batch = make_batch(part, packed=packed)
            states.append(completion_states(model, batch).float())
            labels.append(batch.targets.to(device))
            lengths = torch.tensor([len(one.completion_ids) for one in part])
            rows.append(start + torch.arange(len(part)).repeat_interleave(lengths))
            progress(start + len(part), len(examples), "reading rows")
    return torch.cat(states), torch.cat(labels), torch.cat(rows)


def _logits(weight: torch.Tensor, states: torch.Tensor, labels: torch.Tensor) -> Any:
    for start in range(0, len(states), CHUNK):
        part = slice(start, start + CHUNK)
        yield states[part] @ weight.T.to(states.device), labels[part]
