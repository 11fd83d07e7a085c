"""Norm tweaking: what rounding shifted is shifted back by the norms, which a quantized file keeps in full precision.

Rounding errors are noise in each weight and a bias in what the layers give: on the quickstart's task a quantized student
ended calls early, one token's decision gone the same way in a quarter of the rows of one function. The gains of the RMS
norms (0.04 % of the weights) are trained to bring the quantized student's distribution to that of the student it was made
from, whole and dense, over text of the task (Li et al. 2023, arXiv:2309.02784). The file keeps its type, size and speed.

The text must be new to the student: where it was taught, it is so sure of itself that rounding hardly shows. Measured on
the quickstart's student in IQ4_NL, 600 rows of each of the two dev sets' kinds, standard error of a difference 0.012: 0.877
and 0.643 right before rounding, 0.840 and 0.682 after it (labels that nobody said go too); tuned on 400 rows that it was
taught 0.830 and 0.655, on 560 to 700 new ones, at rates from 5e-4 to 2e-3, 0.847 to 0.872 and 0.637 to 0.658. Another
student (the same recipe on another processor) came closer at 3e-4 only: 0.0046 nats a token from 0.0050, where 1e-3 gave 0.0053.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.losses import LossTerms, completion_loss
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.precision import pick_device, torch_dtype
from edgedistill.training.settings import TrainResult, TrainSettings

CHECKED = 5
"""One of so many rows is not trained on: by these it is decided whether the tuned norms ship."""
ROWS = 8
TERMS = LossTerms(kd=1.0, ce=0.0)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The trained gains by their names in transformers, and the mean KLD a token to the whole student on the ``rows`` that
    were held out, ``before`` and ``after``.
    """

    norms: dict[str, torch.Tensor]
    before: float
    after: float
    rows: int
    tokens: int
    result: TrainResult

    @property
    def helped(self) -> bool:
        """Tell whether the tuned norms are closer to the whole student on rows that they were not trained on."""
        return self.after < self.before

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the norms."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("norms", "result")}
        return {**kept, "helped": self.helped, "norms": len(self.norms)}


def is_norm(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether a parameter is a gain of a norm."""
    return parameter.ndim == 1 and "norm" in name and name.endswith(".weight")


def tune_norms(
    quantized: Path,
    student: Path,
    examples: Sequence[Example],
    *,
    settings: TrainSettings,
    work: Path,
    progress: Callable[[int, int, str], None] | None = None,
) -> Tuned:
    """Train the norms of ``quantized``, a checkpoint of the dequantized weights, towards ``student`` over ``examples``.

    ``settings`` give learning rate, batches and seed; what is trained and on which loss is fixed. Resumes what ``work``
    holds. Raises UsageError for fewer than 10 rows, and as ``train``.
    """
    from edgedistill.training.recipe import load_model
    from edgedistill.training.trainer import train

    settings = replace(settings, method="norms", loss=TERMS)
    if len(examples) < 2 * CHECKED:
        raise UsageError(
            f"{len(examples)} rows are too few to tune norms on", f"give tune.files at least {2 * CHECKED}"
        )
    held, taught = list(examples[CHECKED - 1 :: CHECKED]), [e for at, e in enumerate(examples) if (at + 1) % CHECKED]
    model = load_model(quantized)
    vocab_size = model.config.vocab_size
    teacher = DenseTeacher(load_model(student), vocab_size)
    dtype = torch_dtype(settings.dtype, pick_device())
    before = mean_kld(model, teacher, held, dtype)
    result = train(load_model(quantized), taught, None, settings=settings, out=work, teacher=teacher, progress=progress)
    norms = read_norms(result.path)
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in norms.items():
            known[name].copy_(value)
    after = mean_kld(model, teacher, held, dtype)
    tokens = round(sum(sum(one.token_weights) for one in held))
    return Tuned(norms=norms, before=before, after=after, rows=len(held), tokens=tokens, result=result)


def save_norms(norms: dict[str, torch.Tensor], folder: Path) -> None:
    """Write gains by name to ``folder/norms.safetensors``."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(
        {name: value.detach().float().contiguous().cpu() for name, value in norms.items()}, folder / "norms.safetensors"
    )


def read_norms(folder: Path) -> dict[str, torch.Tensor]:
    """Read what ``save_norms`` wrote."""
    from safetensors.torch import load_file

    return load_file(folder / "norms.safetensors")


def mean_kld(model: Any, teacher: DenseTeacher, examples: Sequence[Example], dtype: torch.dtype) -> float:
    """Return the mean forward KL from ``teacher`` a completion token; ``model`` computes in ``dtype`` and keeps its own."""
    device = pick_device()
    exact = {name: parameter.data for name, parameter in model.named_parameters()}
    teacher.to(device, dtype)
    total, tokens = 0.0, 0
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, dtype)
        model.to(device).eval()
        with torch.no_grad(), packed_mode(model) as packed:
            for start in range(0, len(examples), ROWS):
                batch = make_batch(examples[start : start + ROWS], packed=packed)
                states = completion_states(model, batch)
                labels, weights = batch.targets.to(states.device), batch.weights.to(states.device)
                kd, _ = completion_loss(
                    model,
                    states,
                    labels,
                    weights,
                    teacher.targets(batch),
                    TERMS,
                    vocab_size=teacher.vocab_size,
                )
                total, tokens = total + float(kd), tokens + float(weights.sum())
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = exact[name]
    return total / tokens
