"""Quantization-aware distillation: the blocks of a quantized file are trained towards the student that it was made from.

Rounding takes every weight to one of the few values that its block offers, and choosing among these by the products of one matrix
(``formats/gguf/rounding.py``) leaves out what the layers after it make of the error. Here all codes, scales and norms are trained
together on what counts, the whole distribution of the student before rounding, over text of the task and other text (QAT's
straight-through estimator, with a teacher as in LLM-QAT, Liu et al. 2023, arXiv:2305.17888); ``latents.py`` has the arithmetic.
The trained numbers are the file's own: packed, not quantized anew, which would throw the gain away.

One row in ``CHECKED`` is held out. One half of these is looked at on the way (``looks.py``), the other once at the end: it alone
says whether the file ships.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.repack import read_matrices
from edgedistill.training.data import Example
from edgedistill.training.dense import DenseTeacher
from edgedistill.training.latents import Latents
from edgedistill.training.looks import Looks
from edgedistill.training.norms import CHECKED, TERMS, mean_kld
from edgedistill.training.precision import pick_device
from edgedistill.training.settings import TrainResult, TrainSettings

FEWEST = 2 * CHECKED
"""Rows of each kind: one for the looks, one for the verdict."""
PLACES, FACTORS, CODES, HALVES = ":places", ":factors", ":codes", ":halves"


class QuantizedWeights:
    """The matrices of a quantized file, by their names in transformers, as something that ``train`` can train.

    ``weights`` are those before rounding, by the same names. Matrices of 8 bits, often the embedding, have lost next to nothing
    and would take as much memory and time as the others: they are trained only where there are no others. The masters of a
    matrix are its places and factors.
    """

    def __init__(self, path: Path, weights: dict[str, torch.Tensor], device: str = "cpu") -> None:
        self.latents: dict[str, Latents] = {}
        self._start: dict[str, torch.Tensor] = {}
        for matrix in read_matrices(path, coarse=True):
            one = self.latents[matrix.name] = Latents(matrix.blocks, matrix.form, device)
            whole = weights.get(matrix.name)
            whole = whole.detach() if whole is not None and tuple(whole.shape) == one.shape else None
            self._start[matrix.name + PLACES], self._start[matrix.name + FACTORS] = one.start(whole)

    def __contains__(self, name: str) -> bool:
        return name in self.latents

    def masters(self, name: str) -> dict[str, torch.Tensor]:
        """Return what is trained of a matrix, as it is at the start; it is handed over, once."""
        return {key: self._start.pop(key) for key in (name + PLACES, name + FACTORS)}

    def weights(self, name: str, masters: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weights of a matrix, float32 [R, C], as the packed file will have them."""
        one = self.latents[name]
        return one.weights(masters[name + PLACES], one.halves(masters[name + FACTORS]))

    def gradients(self, name: str, gradient: torch.Tensor, masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the gradients of a matrix's masters, of that of its weights."""
        found = self.latents[name].gradients(gradient, masters[name + PLACES], masters[name + FACTORS])
        return dict(zip((name + PLACES, name + FACTORS), found, strict=True))

    def groups(self, masters: dict[str, torch.Tensor], settings: TrainSettings) -> list[dict[str, Any]]:
        """Return the optimiser's groups: ``times`` is each one's learning rate over ``settings.lr``, which is that of none."""
        kinds: dict[float, list[torch.Tensor]] = {}
        rates = {PLACES: settings.code_lr, FACTORS: settings.scale_lr}
        for key, one in masters.items():
            rate = next((rate for ending, rate in rates.items() if key.endswith(ending)), settings.norm_lr)
            kinds.setdefault(rate, []).append(one)
        return [{"params": params, "times": rate / settings.lr, "weight_decay": 0.0} for rate, params in kinds.items()]

    def save(self, masters: dict[str, torch.Tensor], folder: Path) -> None:
        """Write codes (uint8) and bases (float16) of every matrix, and the norms (float32), to ``folder/weights.safetensors``."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = {}
        for key, one in masters.items():
            name, _, what = key.rpartition(":")
            if what == PLACES[1:]:
                found[name + CODES] = self.latents[name].rounded(one)
            elif what == FACTORS[1:]:
                found[name + HALVES] = self.latents[name].halves(one)
            else:
                found[key] = one.detach().float()
        save_file({key: one.contiguous().cpu() for key, one in found.items()}, folder / "weights.safetensors")


@dataclass(frozen=True, kw_only=True)
class TunedWeights:
    """What ``train`` left in ``folder``, and the mean KLD a token to the whole student on rows that no step and no look saw:
    ``before`` and ``after`` of ``rows`` of the task, ``elsewhere`` of other text, which may grow by the factor ``worse``.
    ``turned`` is the share of the weights whose code is another one; ``step`` the one whose weights these are, 0: none was
    better than the start.
    """

    folder: Path
    before: float
    after: float
    rows: int
    tokens: int
    elsewhere: tuple[float, float]
    worse: float
    matrices: int
    turned: float
    norms: int
    step: int
    result: TrainResult

    @property
    def helped(self) -> bool:
        """Tell whether the trained file is closer to the whole student, and no further from it elsewhere than it may be."""
        before, after = self.elsewhere
        return self.step > 0 and self.after < self.before and after <= self.worse * before

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        kept = {key: value for key, value in vars(self).items() if key not in ("folder", "result")}
        return {**kept, "elsewhere": list(self.elsewhere), "parts": "weights", "helped": self.helped}


def tune_weights(
    file: Path,
    quantized: Path,
    student: Path,
    examples: Sequence[Example],
    general: Sequence[Example],
    *,
    settings: TrainSettings,
    worse: float,
    work: Path,
    progress: Callable[[int, int, str], None] | None = None,
) -> TunedWeights:
    """Train the blocks of ``file`` and its norms towards ``student`` over ``examples`` and ``general``, rows of other text.

    ``quantized`` is the checkpoint of the file's dequantized weights. ``settings`` give learning rates, batches and seed.
    Resumes what ``work`` holds. Raises UsageError for fewer than 10 rows of either kind, and as ``train``.
    """
    from edgedistill.training.recipe import load_model
    from edgedistill.training.trainer import train

    settings = replace(settings, method="weights", loss=TERMS, weight_decay=0.0)
    for rows, key in ((examples, "tune.files"), (general, "tune.general.files")):
        if len(rows) < FEWEST:
            raise UsageError(f"{len(rows)} rows are too few to tune weights on", f"give {key} at least {FEWEST}")
    task, other = _split(examples), _split(general)
    device, exact = pick_device(), torch.float32  # bf16 would round the weights that are compared

    def judge(model: Any) -> tuple[float, float]:
        whole = DenseTeacher(load_model(student), model.config.vocab_size)
        return mean_kld(model, whole, task[2], exact), mean_kld(model, whole, other[2], exact)

    before = judge(load_model(quantized))
    whole = load_model(student)
    blocks = QuantizedWeights(file, dict(whole.named_parameters()), device)
    teacher = DenseTeacher(whole, whole.config.vocab_size)
    looks = Looks(teacher, task[1], other[1], worse=worse, folder=work)
    result = train(
        load_model(quantized),
        [*task[0], *other[0]],
        None,
        settings=settings,
        out=work,
        teacher=teacher,
        blocks=blocks,
        looks=looks,
        progress=progress,
    )
    del teacher, looks, whole
    model = load_model(quantized)
    trained = load_file(result.path / "weights.safetensors")
    turned = _put(model, trained, blocks)
    after = judge(model)
    return TunedWeights(
        folder=result.path,
        before=before[0],
        after=after[0],
        rows=len(task[2]),
        tokens=round(sum(sum(one.token_weights) for one in task[2])),
        elsewhere=(before[1], after[1]),
        worse=worse,
        matrices=len(blocks.latents),
        turned=turned,
        norms=sum(not key.endswith((CODES, HALVES)) for key in trained),
        step=result.best_step or 0,
        result=result,
    )


def read_trained(folder: Path) -> tuple[dict[str, tuple[Any, Any]], dict[str, Any]]:
    """Return {matrix: (codes uint8 [R, C], bases float16 [R, blocks, halves])} and {norm: gain}, numpy, of what was saved."""
    found = {key: one.numpy() for key, one in load_file(folder / "weights.safetensors").items()}
    names = [key.removesuffix(CODES) for key in found if key.endswith(CODES)]
    norms = {key: one for key, one in found.items() if not key.endswith((CODES, HALVES))}
    return {name: (found[name + CODES], found[name + HALVES]) for name in names}, norms


def _split(examples: Sequence[Example]) -> tuple[list[Example], list[Example], list[Example]]:
    """Return the rows to train on, those to look at, and those for the verdict."""
    held = list(examples[CHECKED - 1 :: CHECKED])
    taught = [one for at, one in enumerate(examples) if (at + 1) % CHECKED]
    return taught, held[::2], held[1::2]


def _put(model: Any, trained: dict[str, torch.Tensor], blocks: QuantizedWeights) -> float:
    """Put trained weights into a model; return the share of the codes that are others."""
    turned = total = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name + CODES in trained:
                one, codes = blocks.latents[name], trained[name + CODES].to(blocks.latents[name].device)
                turned, total = turned + int((codes != one.codes).sum()), total + codes.numel()
                parameter.copy_(one.weights(codes.float(), trained[name + HALVES].to(one.device)))
            elif name in trained:
                parameter.copy_(trained[name])
    return turned / max(1, total)
