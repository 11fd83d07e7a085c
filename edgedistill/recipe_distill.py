"""The tables of a recipe that say how the student is taught: its loss, what is drawn to the teacher's states, what it keeps, the
rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgedistill.recipe_base import Count, Layer, Lora, Ordered, Positive, Rows, Section, Share, Tabled
from edgedistill.training.objectives import DivergenceName, problem


class Loss(Section):
    """``kd`` x divergence to the teacher + ``ce`` x cross-entropy on the kept text."""

    kd: Annotated[float, Field(ge=0)] = 0.7
    ce: Annotated[float, Field(ge=0)] = 0.3
    divergence: DivergenceName = "forward-kl"
    share: float | None = Field(
        default=None,
        description="of the distribution named first in the mixture of jsd (0.5) and the skewed ones (0.1)",
    )
    temperature: Positive = 1.0

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if self.kd + self.ce <= 0:
            raise ValueError("kd and ce are both 0: nothing would be learnt")
        if found := problem(self.divergence, self.share, "", self.temperature):
            raise ValueError(f"{found[0]}: {found[1]}")
        return self


class Relations(Section):
    """Weights of what is compared between the rows of a micro-batch (RKD, arXiv:1904.05068); 0: nothing."""

    distances: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of every two rows, over their mean")
    angles: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of every three rows")


class Features(Section):
    """Hidden states that are drawn to the teacher's, which runs beside the student. ``weight`` 0 compares relations alone."""

    LATER = ("cached",)

    weight: Annotated[float, Field(ge=0)] = Field(default=1.0, description="of the mean error of a token's states")
    pairs: Literal["even"] | Annotated[tuple[tuple[Layer, Layer], ...], Field(min_length=1)] = Field(
        default="even",
        description="[layer of the teacher, layer of the student], from 0; even: each of the student's, evenly spaced",
    )
    distance: Literal["mse", "cosine"] = Field(
        default="mse", description="mse is relative to the teacher's mean square"
    )
    project: bool = Field(
        default=False, description="through a matrix in training where the widths agree, too; it does not ship"
    )
    relations: Relations = Relations()
    cached: bool = Field(
        default=False,
        description="the teacher's states are stored once, by a step of their own, instead of computed in every epoch",
    )

    @property
    def on(self) -> bool:
        """Tell whether anything is compared."""
        return bool(self.weight or self.relations.distances or self.relations.angles)


class Keep(Tabled):
    """General rows beside the task's, so that the student keeps what it knew (``training/keeping.py``). One in five is held out:
    the loss on these, before and after, is what was forgotten.
    """

    files: Annotated[tuple[Path, ...], Field(min_length=1, description="rows with references, of no suite")]
    rows: Rows = None
    share: Annotated[float, Field(gt=0, le=4)] = Field(
        default=0.25, description="so many of them in each step, as a share of batch_size"
    )
    kl: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="weight of the mean divergence from the student's own start"
    )
    ce: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight of the mean cross-entropy on references")
    stop: Positive | None = Field(
        default=None,
        description="rise of the loss on rows held out, nats a token, that ends training; the last weights within it ship",
    )

    @model_validator(mode="after")
    def _something(self) -> Keep:
        if not (self.kl or self.ce or self.stop):
            raise ValueError("kl and ce are both 0, and nothing stops training: nothing would be kept")
        return self


class Distill(Ordered):
    """Train the student on the kept rows and their distributions. Another ``seed`` trains anew on the same targets."""

    LATER = (
        *Ordered.LATER,
        *("think_weight", "on_policy", "on_policy_tokens", "on_policy_temperature", "features", "keep"),
    )

    method: Literal["lora", "qlora", "full"] = "lora"
    lora: Lora = Lora()
    loss: Loss = Loss()
    seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="of the adapter and the order of rows; none: the recipe's"
    )
    on_policy: Share = Field(
        default=0.0, description="share of the rows that the student writes itself, for the teacher beside it to judge"
    )
    on_policy_tokens: Count = Field(default=64, description="the longest answer that it writes")
    on_policy_temperature: Positive = Field(default=1.0, description="of its draws")
    think_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="what a token of thinking counts in the loss, against 1 of the answer; 0: not at all"
    )
    features: Features | None = Field(default=None, description="hidden states to be matched, too; none: no")
    keep: Keep | None = None


class Round(Section):
    """After the first distillation, and after the rounds before it: new answers, on which the last student is trained further, as
    ``[distill]`` says. ``self``: it answers the prompts itself, and learns what the filters keep of that (STaR, arXiv:2203.14465;
    ReST, arXiv:2308.08998). ``online``: the teacher answers anew the prompts that the student still gets wrong.
    """

    kind: Literal["self", "online"]
    samples: Count = Field(default=4, description="answers to each prompt")
    temperature: Annotated[float, Field(ge=0)] = 0.8
    keep: Count = Field(
        default=1,
        description="learnt of the answers to one prompt that pass: the first so many that differ, which is a fair draw of them "
        "(the shortest would make every round terser, the likeliest narrower)",
    )
    replay: Share = Field(
        default=1.0, description="online: share of the rows taught before that are taught again, against forgetting"
    )

    @model_validator(mode="after")
    def _works(self) -> Round:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples > 1 at temperature 0 are all the same: set temperature")
        if self.kind == "online" and self.temperature == 0:
            raise ValueError("at temperature 0 the teacher answers as it did before: set temperature")
        if self.keep > self.samples:
            raise ValueError(f"keep = {self.keep} of samples = {self.samples}: ask for more samples, or keep fewer")
        if self.kind == "self" and self.replay != 1.0:
            raise ValueError('replay is for kind = "online": a round of its own answers asks every prompt again')
        return self
