"""What the tables of a recipe are made of: their base, the numbers that they take, and what several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edgedistill.data.columns import Columns, template_problem
from edgedistill.toml_source import key_error

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]
Rows = Annotated[
    Count | tuple[Count, ...] | None,
    Field(description="use the first so many rows of each file: one count for all, or a list of one for each"),
]
Skip = Annotated[
    Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...],
    Field(description="leave out the first so many rows of each file: one count for all, or a list of one for each"),
]

Given = Annotated[
    Annotated[str, Field(min_length=1)] | None,
    Field(
        description='the chat template of a checkpoint that has none, or instead of its own: "chatml", "plain", "teacher" (what '
        "the teacher is shown), or a Jinja file beside the recipe"
    ),
]


class Section(BaseModel):
    """Base of every table: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    LATER: ClassVar[tuple[str, ...]] = ()
    """Fields that came after the first release. At their default they are no part of a key: what was built before is
    still what would be built."""
    READ: ClassVar[tuple[str, ...]] = ()
    """Fields that say how rows are read. The digest of the rows says all of it, so they are no part of a key."""

    def keyed(self, *exclude: str) -> dict[str, Any]:
        """Return the fields as plain values for a step's key, without those that stand for nothing new."""
        fields = type(self).model_fields
        found = self.model_dump(exclude={*exclude, *self.READ})
        for name in self.LATER:
            if getattr(self, name) == fields[name].default:
                found.pop(name, None)
        for name in found:
            value = getattr(self, name)
            if isinstance(value, Section):
                found[name] = value.keyed()
        return found


class Tabled(Section):
    """Tables that name files of rows: how a row is made of a record's columns, and which rows are taken."""

    READ = ("template", "system", "reference", "split", "tags")

    files: tuple[Path, ...]
    template: str | None = Field(
        default=None,
        description="writes the prompt of a row from its columns: {name}; braces that are text are doubled",
    )
    system: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="the system message of rows that have none, as it is"
    )
    reference: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="the column that holds the wanted answer"
    )
    split: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description='take the rows of this "split" alone; every row of the files has to name one'
    )
    tags: tuple[str, ...] = Field(default=(), description='take the rows that have one of these "tags"')

    @field_validator("template")
    @classmethod
    def _fillable(cls, template: str | None) -> str | None:
        if template is not None and (problem := template_problem(template)):
            raise ValueError(problem)
        return template

    @property
    def columns(self) -> Columns:
        """Return what the keys say, for the readers of rows."""
        return Columns(**{name: getattr(self, name) for name in self.READ})


class Lora(Section):
    """A low-rank adapter (arXiv:2106.09685) on every linear layer of the blocks; never on tied embeddings."""

    LATER = ("dora", "rslora")

    rank: Count = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    dora: bool = Field(
        default=False, description="learn each weight's length apart from its direction (arXiv:2402.09353)"
    )
    rslora: bool = Field(
        default=False,
        description="scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732): for large ranks",
    )


class Training(Section):
    """What every training step shares. Optimizers have transformers' names."""

    LATER = ("optimizer", "gradient_checkpointing")

    epochs: Positive = 2.0
    batch_size: Count = 16
    lr: Positive = 2e-4
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    accumulate: Count = 1
    optimizer: Literal["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"] = "adamw_torch"
    gradient_checkpointing: bool = Field(
        default=False,
        description="keep each layer's input only and compute the rest again: less memory, for one more forward",
    )


class Ordered(Training):
    """Training whose rows may come from easy to hard in the first epoch (``training/curriculum.py``)."""

    LATER = (*Training.LATER, "curriculum")

    curriculum: Literal["none", "length", "loss", "confidence", "evolution"] = Field(
        default="none",
        description="from easy to hard in the first epoch, then shuffled: by the length of the completion, the student's loss at "
        "its start, the teacher's confidence (stored distributions), or the row's \"evolution\" (round; 0: a seed)",
    )

    @model_validator(mode="after")
    def _whole_epoch(self) -> Ordered:
        if self.curriculum != "none" and self.epochs < 1:
            raise key_error(
                "curriculum",
                f"from easy to hard in {self.epochs:g} epochs, the hardest rows would never be learnt: set epochs to 1 or more",
            )
        return self


class Shaped(Section):
    """What of a model is kept. ``layers``: "all", a count (evenly spaced, first and last kept; or, by ``layers_by``, those that
    change the states of the task's rows most) or a list of layer numbers.
    ``hidden`` makes the residual stream, what every layer reads and writes, narrower: the directions that the task's rows use
    most stay (``training/residual.py``).
    ``ffn`` makes every layer's FFN narrower: the neurons that the task's rows need stay, and their weights are fitted to do
    the others' work (``training/ffn.py``). ``vocabulary`` keeps so many tokens, those of the taught rows among them
    (``training/vocabulary.py``).
    """

    layers: Literal["all"] | Count | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = "all"
    layers_by: Literal["spacing", "importance"] = Field(
        default="spacing",
        description="which layers a count keeps: evenly spaced ones, or those that the rows need most",
    )
    hidden: Count | None = Field(
        default=None,
        description="dimensions of the residual stream, best a multiple of 256 (k-quants); none: as many as it has",
    )
    ffn: Count | None = Field(
        default=None, description="neurons of each FFN, a multiple of 32; none: as many as it has"
    )
    ffn_rows: Count = Field(
        default=600,
        description="rows of heal.files, else adapt.files, that choose the neurons, what hidden keeps, and layers by importance",
    )
    vocabulary: Count | None = Field(
        default=None, description="tokens to keep, rarer words are spelt in pieces; none: all of them"
    )

    @model_validator(mode="after")
    def _counted(self) -> Shaped:
        if self.layers_by == "importance" and not isinstance(self.layers, int):
            raise ValueError('layers_by = "importance" chooses so many layers: set layers to a count')
        return self
