"""The recipe: what to teach, from which teacher, to which student, and what is good enough to ship.

Every default lives here, once. A key that is not built does not exist, and is refused with its line and a suggestion.
Paths are relative to the recipe's folder. ``edgedistill schema`` prints this as JSON Schema for editors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgedistill.toml_source import load_toml
from edgedistill.training.objectives import DivergenceName, problem

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Rows = Annotated[
    Count | tuple[Count, ...] | None,
    Field(description="use the first so many rows of each file: one count for all, or a list of one for each"),
]


Skip = Annotated[
    Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...],
    Field(description="leave out the first so many rows of each file: one count for all, or a list of one for each"),
]


class Section(BaseModel):
    """Base of every table: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Section):
    """A low-rank adapter (arXiv:2106.09685) on every linear layer of the blocks; never on tied embeddings."""

    rank: Count = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"


class Training(Section):
    """What every training step shares."""

    epochs: Positive = 2.0
    batch_size: Count = 16
    lr: Positive = 2e-4
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    accumulate: Count = 1


class Teacher(Section):
    """The model that is proved to do the task. Under ``min_score`` (suite -> score) nothing is generated."""

    model: str
    backend: Literal["transformers"] = "transformers"
    min_score: dict[str, Share] = {}


class Adapt(Training):
    """Fine-tune the teacher on gold data first."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None
    method: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()


class Student(Section):
    """The model that ships. ``model`` "teacher" starts from the adapted teacher's weights. ``layers``: "all", a count
    (evenly spaced, first and last kept) or a list of layer numbers. ``ffn`` makes every layer's FFN narrower: the
    neurons that the task's rows need stay, and their weights are fitted to do the others' work (``training/ffn.py``).
    ``vocabulary`` keeps so many tokens, those of the taught rows among them (``training/vocabulary.py``).
    """

    model: str = Field(description='a source of weights, or "teacher": the teacher as [adapt] left it')
    layers: Literal["all"] | Count | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = "all"
    ffn: Count | None = Field(
        default=None, description="neurons of each FFN, a multiple of 32; none: as many as it has"
    )
    ffn_rows: Count = Field(default=600, description="rows of heal.files, else adapt.files, that choose the neurons")
    vocabulary: Count | None = Field(
        default=None, description="tokens to keep, rarer words are spelt in pieces; none: all of them"
    )


class Heal(Training):
    """Train the pruned student in full, so that an adapter has something to adapt: on the kept text, or on the
    references of ``files``. ``hidden`` weighs the distance of its hidden states from the teacher's.
    """

    files: tuple[Path, ...] = Field(
        default=(), description="rows with references; none: the text that the filters kept"
    )
    rows: Rows = None
    hidden: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the hidden states' relative error; 0: cross-entropy alone"
    )
    epochs: Positive = 3.0
    lr: Positive = 6e-4
    freeze_embeddings: bool = True


class Prompts(Section):
    """The prompts that the teacher answers: JSONL with id, messages | prompt, reference, tags."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None


class Generate(Section):
    """How the teacher answers. Temperature 0 is greedy."""

    style: Literal["answer"] = "answer"
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 64
    batch_size: Count = 64

    @model_validator(mode="after")
    def _samples_differ(self) -> Generate:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples > 1 at temperature 0 are all the same: set temperature")
        return self


class Filter(Section):
    """Keep answers that pass. ``otherwise = "gold"`` trains on the reference where no answer passed: no prompt is
    lost.
    """

    kind: Literal["reference"]
    metric: Literal["json-exact", "exact", "contains"] = "json-exact"
    otherwise: Literal["drop", "gold"] = "drop"


class Score(Section):
    """The teacher's distributions over the kept tokens: n random draws (RS-KD, ACL 2025), the top n and a tail, all of it
    (``dense``: nothing is stored, the teacher runs beside the student), or none.
    """

    kind: Literal["sampled", "top-k", "dense", "none"] = "sampled"
    n: Annotated[int, Field(ge=1, le=256)] = 12
    temperature: Positive | None = Field(
        default=None, description="temperature of the draws; loss.temperature when left out"
    )


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


class Distill(Training):
    """Train the student on the kept rows and their distributions."""

    method: Literal["lora", "qlora", "full"] = "lora"
    lora: Lora = Lora()
    loss: Loss = Loss()


class Calibrate(Section):
    """Rows of the training text that the importance matrix is measured on."""

    rows: Count = 200


class Tune(Training):
    """Train the norms of quantized files towards the student that they were made from, whole: what rounding shifted is
    shifted back, and type, size and speed stay. ``skip`` leaves out the first so many rows of each file: text that the
    student was taught shows little of what rounding did.
    """

    targets: Annotated[tuple[str, ...], Field(min_length=1, description="whose files: GGUF targets of this recipe")]
    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None
    skip: Skip = 0
    epochs: Positive = 1.0
    batch_size: Count = 8
    lr: Positive = 1e-3
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.95


class Suite(Section):
    """A test set. ``grammar`` (GBNF) adds a second score, decoded under it."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    metric: Literal["json-exact", "exact", "contains", "perplexity"]
    grammar: Path | None = None
    max_new_tokens: Count = 64


class Gates(Section):
    """What an artifact must reach to be packaged. ``min_speedup`` and ``min_shrink`` may differ by target.

    ``min_retention``: suite -> artifact over teacher, lower bound of the 95 % interval. ``max_drop``: suite -> how
    far under the merged full-precision student, paired point estimate. ``min_speedup``: decode speed over the
    teacher's f16 GGUF in the same session. ``min_shrink``: the teacher's f16 GGUF over the artifact, in bytes."""

    min_retention: dict[str, Positive] = {}
    max_drop: dict[str, Annotated[float, Field(ge=0)]] = {}
    min_speedup: Positive | dict[str, Positive] | None = None
    min_shrink: Positive | dict[str, Positive] | None = None


class Baselines(Section):
    """What a sceptic asks for, built and measured beside the student."""

    few_shot: int = Field(default=0, ge=0, description="base model with so many training examples in its prompt")
    gold_sft: bool = Field(default=False, description="the same healed student trained on references only")
    quantized_teacher: str | None = Field(default=None, description="GGUF type, e.g. Q4_0")


class QuantizeOverride(Section):
    """Override one profile's choice of types."""

    type: str | None = None
    imatrix: bool | None = None
    embedding_type: str | None = None
    output_type: str | None = None
    rounding: Literal["nearest", "gptq"] | None = None


class Recipe(Section):
    """One recipe file."""

    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: Teacher
    adapt: Adapt | None = None
    student: Student
    prompts: Prompts
    generate: Generate = Generate()
    filter: tuple[Filter, ...] = ()
    score: Score = Score()
    heal: Heal | None = None
    distill: Distill = Distill()
    calibrate: Calibrate = Calibrate()
    quantize: dict[str, QuantizeOverride] = {}
    tune: Tune | None = None
    suites: dict[str, Suite] = {}
    gates: Gates = Gates()
    baselines: Baselines = Baselines()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.tune and isinstance(self.tune.skip, tuple) and len(self.tune.skip) != len(self.tune.files):
            raise ValueError(f"tune.skip has {len(self.tune.skip)} counts for {len(self.tune.files)} files")
        sections = {"adapt": self.adapt, "heal": self.heal, "prompts": self.prompts, "tune": self.tune}
        for place, section in sections.items():
            if section is not None and isinstance(section.rows, tuple) and len(section.rows) != len(section.files):
                raise ValueError(f"{place}.rows has {len(section.rows)} counts for {len(section.files)} files")
        for place, names in (
            ("teacher.min_score", self.teacher.min_score),
            ("gates.min_retention", self.gates.min_retention),
            ("gates.max_drop", self.gates.max_drop),
        ):
            for name in names:
                if name not in self.suites:
                    raise ValueError(
                        f"{place} names the suite {name!r}; [suites] has {', '.join(self.suites) or 'none'}"
                    )
                if self.suites[name].metric == "perplexity":
                    raise ValueError(f"{place}: {name!r} is measured by perplexity, which has no score")
        per_target: list[tuple[str, Any]] = [
            ("quantize", self.quantize),
            ("gates.min_speedup", self.gates.min_speedup),
            ("gates.min_shrink", self.gates.min_shrink),
        ]
        for place, names in per_target:
            for name in names if isinstance(names, dict) else ():
                if name not in self.targets:
                    raise ValueError(f"{place} names the target {name!r}; targets has {', '.join(self.targets)}")
        for name in self.tune.targets if self.tune else ():
            if name not in self.targets:
                raise ValueError(f"tune.targets names the target {name!r}; targets has {', '.join(self.targets)}")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets names one target twice")
        if self.score.kind == "none" and self.distill.loss.kd > 0:
            raise ValueError('score.kind = "none" leaves no distributions: set distill.loss.kd = 0')
        loss = self.distill.loss
        if loss.kd > 0 and (found := problem(loss.divergence, loss.share, self.score.kind, loss.temperature)):
            raise ValueError(f"distill.loss.divergence: {found[0]}: {found[1]}")
        if self.baselines.few_shot and not self.adapt:
            raise ValueError("baselines.few_shot takes its examples from adapt.files: add [adapt], or leave it out")
        return self


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe; ``overrides`` are dotted keys of ``--set``. Raises RecipeError with file, line and key."""
    return load_toml(path, Recipe, overrides=overrides)
