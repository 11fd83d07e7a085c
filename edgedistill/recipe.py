"""The recipe: what to teach, from which teacher, to which student, and what is good enough to ship.

Every default lives here, once. A key that is not built does not exist, and is refused with its line and a suggestion.
Paths are relative to the recipe's folder. ``edgedistill schema`` prints this as JSON Schema for editors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgedistill.data.thinking import LEAST_WORDS
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

    LATER: ClassVar[tuple[str, ...]] = ()
    """Fields that came after the first release. At their default they are no part of a key: what was built before is
    still what would be built."""

    def keyed(self, *exclude: str) -> dict[str, Any]:
        """Return the fields as plain values for a step's key, without those that stand for nothing new."""
        fields = type(self).model_fields
        found = self.model_dump(exclude=set(exclude))
        for name in self.LATER:
            if getattr(self, name) == fields[name].default:
                found.pop(name, None)
        for name in found:
            value = getattr(self, name)
            if isinstance(value, Section):
                found[name] = value.keyed()
        return found


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


class Student(Shaped):
    """The model that ships. ``model`` "teacher" starts from the weights of the adapted teacher, or of the last link of the
    chain.
    """

    model: str = Field(description='a source of weights, or "teacher": the teacher as [adapt] left it')


class Link(Shaped):
    """An intermediate student: cut out of what the link before it became (the first: out of the teacher), healed and distilled as
    the last one is, by it. Each gap is smaller than that from the teacher to the student.
    """


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
    """How the teacher answers. Temperature 0 is greedy. ``style``: ``answer``; ``think`` and ``plan`` write a block before
    it; of ``rationale`` the student learns the answer alone, and to say why when asked (``data/thinking.py``).
    """

    style: Literal["answer", "think", "plan", "rationale"] = "answer"
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
    """Keep answers that pass: ``reference`` compares with the row's, ``thinking`` counts the words before the answer.
    ``otherwise = "gold"`` trains on the reference where no answer passed: no prompt is lost.
    """

    LATER = ("min_words", "max_words")

    kind: Literal["reference", "thinking"]
    metric: Literal["json-exact", "exact", "contains"] = "json-exact"
    otherwise: Literal["drop", "gold"] = "drop"
    min_words: Annotated[int, Field(ge=0)] = Field(
        default=LEAST_WORDS, description="thinking: fewer words are no thought"
    )
    max_words: Count | None = Field(default=None, description="thinking: a budget for devices that write slowly")

    @model_validator(mode="after")
    def _words(self) -> Filter:
        if self.kind != "thinking" and (self.min_words, self.max_words) != (LEAST_WORDS, None):
            raise ValueError('min_words and max_words are for kind = "thinking"')
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"max_words = {self.max_words} is under min_words = {self.min_words}: nothing would pass")
        return self


class Score(Section):
    """The teacher's distributions over the kept tokens: n random draws (RS-KD, ACL 2025), the top n and a tail, two thirds
    of n best and a third drawn from the rest (``top-sampled``), all of it (``dense``: nothing is stored, the teacher runs
    beside the student), or none.
    """

    kind: Literal["sampled", "top-k", "top-sampled", "dense", "none"] = "sampled"
    n: Annotated[int, Field(ge=1, le=255)] = 12
    temperature: Positive | None = Field(
        default=None, description="temperature of the draws; loss.temperature when left out"
    )

    @model_validator(mode="after")
    def _best_and_drawn(self) -> Score:
        if self.kind == "top-sampled" and self.n < 3:
            raise ValueError(f"top-sampled needs an n of 3 or more (two best ids and a draw), not {self.n}")
        return self


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
    """Train the student on the kept rows and their distributions. Another ``seed`` trains anew on the same targets."""

    LATER = (*Training.LATER, "think_weight", "on_policy", "on_policy_tokens", "on_policy_temperature")

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
    chain: tuple[Link, ...] = ()
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
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        default={}, description='for `edgedistill sweep`: dotted keys and their values, "distill.lora.rank" = [8, 16]'
    )

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
        if self.chain and self.student.model != "teacher":
            raise ValueError(
                '[[chain]] ends in a student that is cut out of its last link: set student.model = "teacher"'
            )
        if self.generate.style == "answer":
            if any(one.kind == "thinking" for one in self.filter):
                raise ValueError('a filter on thinking needs generate.style = "think", "plan" or "rationale"')
            if self.distill.think_weight != 1.0:
                raise ValueError('distill.think_weight needs generate.style = "think", "plan" or "rationale"')
        if self.distill.on_policy and not (self.score.kind == "dense" and self.distill.loss.kd > 0):
            raise ValueError(
                'distill.on_policy needs the teacher beside the student: set score.kind = "dense" and loss.kd above 0'
            )
        if self.distill.on_policy and self.distill.think_weight != 1.0:
            raise ValueError(
                "distill.think_weight cannot be told of what the student writes: set it to 1, or on_policy to 0"
            )
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
