"""The recipe: what to teach, from which teacher, to which student, and what is good enough to ship.

Every default lives in these classes, once (``recipe_base.py``: what the tables share; ``recipe_teacher.py``,
``recipe_prompts.py``, ``recipe_filter.py``, ``recipe_labels.py``, ``recipe_distill.py``, ``recipe_tune.py`` and
``recipe_draft.py``: who teaches, what is asked, what is kept, how the student is taught, how its files are tuned, what drafts for
them). A key that is not built does not exist, and is refused with its line and a suggestion. Paths are relative to the recipe's
folder. ``edgedistill schema`` prints this as JSON Schema for editors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgedistill.data.columns import Columns
from edgedistill.data.thinking import AFTER, BLOCKS
from edgedistill.recipe_base import Count, Given, Lora, Ordered, Positive, Rows, Section, Shaped, Skip, Tabled, Training
from edgedistill.recipe_distill import Distill, Round
from edgedistill.recipe_draft import Draft
from edgedistill.recipe_filter import Filter
from edgedistill.recipe_labels import Labels, refuse_labels, refuse_samples
from edgedistill.recipe_metric import SuiteMetric
from edgedistill.recipe_prompts import Prompts
from edgedistill.recipe_teacher import Another, Judge, Teacher, refuse_accounts, refuse_backend, refuse_several
from edgedistill.recipe_tune import Tune
from edgedistill.target import Size
from edgedistill.toml_source import key_error, load_toml
from edgedistill.training.objectives import DRAWN, REACH, WHOLE, problem

THINKING = " or ".join(f'"{style}"' for style in BLOCKS)
ANALYSED = tuple(style for style in BLOCKS if style != "rationale")
"""Styles whose answers can say what was wrong before."""


class Adapt(Tabled, Training):
    """Fine-tune the teacher on gold data first."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None
    method: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()


class Student(Shaped):
    """The model that ships. ``model`` "teacher" starts from the weights of the adapted teacher, or of the last link of the
    chain.
    """

    model: str = Field(description='a source of weights, or "teacher": the teacher as [adapt] left it')
    chat_template: Given = None

    @model_validator(mode="after")
    def _of_the_teacher(self) -> Student:
        if self.model == "teacher" and self.chat_template is not None:
            raise key_error(
                "chat_template", "the student starts from the teacher's checkpoint: set teacher.chat_template"
            )
        return self


class Heal(Tabled, Ordered):
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


class Generate(Section):
    """How the teacher answers. Temperature 0 is greedy. ``style``: ``answer``; ``think`` and ``plan`` write a block before
    it; of ``rationale`` the student learns the answer alone, and to say why when asked; ``explanation`` and ``verification``
    say why, or check, after the answer (``data/thinking.py``); rows of ``tool-trace`` hold calls and their results, and every
    turn of the assistant's is learnt (``data/traces.py``).
    """

    style: Literal["answer", "think", "plan", "rationale", "explanation", "verification", "tool-trace"] = "answer"
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 64
    batch_size: Count = 64
    pilot: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="answer and filter this share of the prompts first, and say what the whole will yield, take and cost",
    )
    json_schema: Path | None = Field(
        default=None,
        description="a JSON Schema: the teacher can write nothing else (llama.cpp, vLLM and other servers)",
    )

    @model_validator(mode="after")
    def _guided(self) -> Generate:
        if self.json_schema is not None and self.style != "answer":
            raise key_error("json_schema", f'a {self.style} is no JSON: set style = "answer"')
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
    combine: Literal["average", "confidence"] | None = Field(
        default=None,
        description='with teachers of role "ensemble": mix the distributions of those whose weights are here and whose tokens are '
        "the student's, evenly or each by its greatest probability at the place; none: the first teacher's alone",
    )

    @model_validator(mode="after")
    def _best_and_drawn(self) -> Score:
        if self.kind == "top-sampled" and self.n < 3:
            raise ValueError(f"top-sampled needs an n of 3 or more (two best ids and a draw), not {self.n}")
        return self


class Calibrate(Section):
    """The text that importance matrices, choices of types and rounding go by."""

    rows: Annotated[Count, Field(description="of the training text")] = 200
    general: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="conversations beside them that the student writes itself: text of all kinds, so that what is "
            "rounded for the task is not lost for the rest; GGUF targets",
        ),
    ] = 0


class Temperature(Tabled):
    """Fit one temperature to the merged student's probabilities, on rows that nobody was taught, and fold it into its final norm:
    greedy answers stay, and how sure it is says how often it is right. ``skip`` leaves out the first so many rows of each file.
    """

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None
    skip: Skip = 0


class Suite(Tabled):
    """A test set. ``grammar`` (GBNF) adds a second score, decoded under it."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    metric: SuiteMetric
    grammar: Path | None = None
    max_new_tokens: Count = 64


class Gates(Section):
    """What an artifact must reach to be packaged. ``min_speedup`` and ``min_shrink`` may differ by target.

    ``min_retention``: suite -> artifact over teacher, lower bound of the 95 % interval. ``max_drop``: suite -> how
    far under the merged full-precision student, paired point estimate. ``min_speedup``: decode speed over the
    teacher's f16 GGUF in the same session. ``min_shrink``: the teacher's f16 GGUF over the artifact, in bytes.
    ``max_kv_kld``: KLD of the file with the target's KV cache from that with an f16 one, nats a token at the target's context,
    upper bound of the 95 % interval."""

    LATER = ("max_kv_kld",)

    min_retention: dict[str, Positive] = Field(default={})
    max_drop: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    min_speedup: Positive | dict[str, Positive] | None = None
    min_shrink: Positive | dict[str, Positive] | None = None
    max_kv_kld: Positive | dict[str, Positive] | None = None


class Link(Shaped):
    """An intermediate student: cut out of what the link before it became (the first: out of the teacher), healed and distilled as
    the last one is, by it. Each gap is smaller than that from the teacher to the student. With ``targets`` it ships, too.
    """

    targets: tuple[str, ...] = Field(
        default=(),
        description="whom this link ships for, beside the last student; [quantize] and [tune] go by their names",
    )
    gates: Gates | None = Field(default=None, description="what its artifacts must reach; none: the recipe's [gates]")

    @model_validator(mode="after")
    def _ships(self) -> Link:
        if self.gates is not None and not self.targets:
            raise key_error("gates", "nothing of this link is packaged: give it targets, or leave its gates out")
        if len(set(self.targets)) != len(self.targets):
            raise key_error("targets", "one target is named twice")
        return self


class Baselines(Section):
    """What a sceptic asks for, built and measured beside the student."""

    few_shot: int = Field(default=0, ge=0, description="base model with so many training examples in its prompt")
    gold_sft: bool = Field(default=False, description="the same healed student trained on references only")
    quantized_teacher: str | None = Field(default=None, description="GGUF type, e.g. Q4_0")


class QuantizeOverride(Section):
    """Override one profile's choice of types."""

    type: str | None = None
    size: Size | None = None
    imatrix: bool | None = None
    embedding_type: str | None = None
    output_type: str | None = None
    rounding: Literal["nearest", "gptq"] | None = None
    block: Literal[32, 64, 128] | None = None
    symmetric: bool | None = None
    accuracy: Literal[1, 4] | None = None


class Recipe(Section):
    """One recipe file."""

    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: Teacher
    teachers: tuple[Another, ...] = Field(default=(), description="further teachers")
    adapt: Adapt | None = None
    chain: tuple[Link, ...] = ()
    student: Student
    prompts: Prompts
    generate: Generate = Generate()
    labels: Labels | None = None
    filter: tuple[Filter, ...] = ()
    judge: Judge | None = None
    score: Score = Score()
    heal: Heal | None = None
    distill: Distill = Distill()
    round: tuple[Round, ...] = ()
    calibrate: Calibrate = Calibrate()
    quantize: dict[str, QuantizeOverride] = Field(default={})
    temperature: Temperature | None = None
    tune: Tune | None = None
    draft: Draft | None = None
    suites: dict[str, Suite] = Field(default={})
    gates: Gates = Gates()
    baselines: Baselines = Baselines()
    compare: dict[Annotated[str, Field(pattern=r"^\w[\w ,.+-]*$")], Annotated[dict[str, Any], Field(min_length=1)]] = (
        Field(
            default={},
            description="does the method help? A name and the keys to set otherwise: the student that they give is built beside "
            'this one and scored on the same rows, "one answer" = { "generate.samples" = 1 }',
        )
    )
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        default={}, description='for `edgedistill sweep`: dotted keys and their values, "distill.lora.rank" = [8, 16]'
    )

    @property
    def hedge(self) -> str | None:
        """What the student says where its teacher fails; None where it is not taught to."""
        return next((one.hedge for one in self.filter if one.hedge), None)

    @model_validator(mode="after")
    def _taught(self) -> Recipe:
        refuse_backend(self)
        refuse_several(self)
        refuse_accounts(self)
        refuse_labels(self)
        refuse_samples(self)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        skipping = {"temperature": self.temperature, "tune": self.tune, "draft": self.draft}
        for place, section in skipping.items():
            if section and isinstance(section.skip, tuple) and len(section.skip) != len(section.files):
                raise ValueError(f"{place}.skip has {len(section.skip)} counts for {len(section.files)} files")
        sections = {
            "adapt": self.adapt,
            "heal": self.heal,
            "prompts": self.prompts,
            **skipping,
            "distill.keep": self.distill.keep,
            "tune.general": self.tune.general if self.tune else None,
        }
        for place, section in sections.items():
            if section is not None and isinstance(section.rows, tuple) and len(section.rows) != len(section.files):
                raise ValueError(f"{place}.rows has {len(section.rows)} counts for {len(section.files)} files")
        every = tuple(dict.fromkeys((*self.targets, *(name for link in self.chain for name in link.targets))))
        gates = [("gates", self.gates, every)]
        gates += [(f"chain.{at}.gates", one.gates, one.targets) for at, one in enumerate(self.chain) if one.gates]
        of_suites = [("teacher.min_score", self.teacher.min_score)]
        for place, one, _ in gates:
            of_suites += [(f"{place}.min_retention", one.min_retention), (f"{place}.max_drop", one.max_drop)]
        for place, names in of_suites:
            for name in names:
                if name not in self.suites:
                    raise ValueError(
                        f"{place} names the suite {name!r}; [suites] has {', '.join(self.suites) or 'none'}"
                    )
                if self.suites[name].metric == "perplexity":
                    raise ValueError(f"{place}: {name!r} is measured by perplexity, which has no score")
        per_target: list[tuple[str, Any, tuple[str, ...]]] = [("quantize", self.quantize, every)]
        for place, one, known in gates:
            per_target += [
                (f"{place}.min_speedup", one.min_speedup, known),
                (f"{place}.min_shrink", one.min_shrink, known),
                (f"{place}.max_kv_kld", one.max_kv_kld, known),
            ]
        for place, names, known in per_target:
            for name in names if isinstance(names, dict) else ():
                if name not in known:
                    raise ValueError(f"{place} names the target {name!r}; targets has {', '.join(known)}")
        for place, section, known in (("tune", self.tune, every), ("draft", self.draft, self.targets)):
            for name in section.targets if section else ():
                if name not in known:
                    raise ValueError(f"{place}.targets names the target {name!r}; targets has {', '.join(known)}")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets names one target twice")
        for number, link in enumerate(self.chain, 1):
            if link.targets and (name := f"link-{number}") in self.compare:
                raise key_error(
                    f"compare.{name}", f"steps of link {number} of the chain are named so: take another name"
                )
        if self.chain and self.student.model != "teacher":
            raise ValueError(
                '[[chain]] ends in a student that is cut out of its last link: set student.model = "teacher"'
            )
        if self.generate.style not in BLOCKS:
            if any(one.kind == "thinking" for one in self.filter):
                raise ValueError(f"a filter on thinking needs generate.style = {THINKING}")
            if self.distill.think_weight != 1.0:
                raise ValueError(f"distill.think_weight needs generate.style = {THINKING}")
        if self.generate.style in AFTER and self.distill.think_weight == 0:
            raise ValueError(
                f'distill.think_weight = 0 in the style "{self.generate.style}" would teach neither to go on after the answer nor '
                'to end there: set generate.style = "answer"'
            )
        for at, one in enumerate(self.filter):
            if one.analysis and self.generate.style not in ANALYSED:
                raise key_error(
                    f"filter.{at}.analysis",
                    "what is wrong is said in a block beside the answer: set generate.style = "
                    + " or ".join(f'"{style}"' for style in ANALYSED),
                )
        if self.judge is not None and not any(one.kind == "judge" for one in self.filter):
            raise key_error("judge", 'there is nothing to judge: add [[filter]] kind = "judge", or leave the table out')
        if any(one.kind == "agreement" for one in self.filter) and self.generate.samples < 3:
            raise ValueError('[[filter]] kind = "agreement" counts answers: raise generate.samples to 3 or more')
        if any(one.keeps_best for one in self.filter) and self.generate.samples == 1 and not self.round:
            raise ValueError(
                '[[filter]] kind = "reward" with keep chooses among several answers: raise generate.samples'
            )
        if any(one.kind == "best" for one in self.filter) and self.generate.samples == 1 and not self.round:
            raise ValueError('[[filter]] kind = "best" chooses among several answers: raise generate.samples')
        for at, one in enumerate(self.filter):
            if one.otherwise != "hedge":
                continue
            if self.generate.style != "answer":
                raise key_error(
                    f"filter.{at}.otherwise",
                    'a hedge is a whole answer: set generate.style = "answer", or otherwise = "gold"',
                )
            if self.score.kind not in ("sampled", "none"):
                raise key_error(
                    f"filter.{at}.otherwise",
                    'the teacher does not hedge, so its distributions there are not used; set score.kind = "sampled" or "none"',
                )
            if any(
                other.otherwise not in ("drop", "hedge") or other.hedge not in (None, one.hedge)
                for other in self.filter
            ):
                raise key_error(
                    f"filter.{at}.otherwise", "one thing is learnt where no answer passed: gold, or one hedge"
                )
        of_files = {**sections, **{f"suites.{name}": suite for name, suite in self.suites.items()}}
        for place, section in of_files.items():
            if section is None:
                continue
            if section.columns != Columns() and not section.files:
                raise key_error(f"{place}.files", "template, reference, split and tags are about files: name some")
            if section.template is not None and self.generate.style == "tool-trace":
                raise key_error(
                    f"{place}.template", "a template writes one prompt, and rows are whole traces: leave it out"
                )
        for at, one in enumerate(self.filter if self.prompts.augment else ()):
            if one.kind == "reference" and one.missing == "reject":
                raise key_error(
                    f"filter.{at}.kind",
                    'augmented prompts have no references, and no answer to them would be kept: set missing = "pass", and let '
                    "other filters judge those",
                )
        if self.generate.pilot is not None and (self.prompts.augment or self.generate.style == "tool-trace"):
            raise key_error("generate.pilot", "a share is taken of single prompts that are there: leave it out")
        if self.generate.style == "tool-trace":
            if self.prompts.augment:
                raise key_error("prompts.augment", "a trace holds calls and their results, and no prompt to write anew")
            if any(one.corrections for one in self.filter):
                raise ValueError(
                    "filter.corrections: a wrong call would need its result, and nothing executes tools: set it to 0"
                )
            if self.distill.on_policy:
                raise ValueError(
                    "distill.on_policy: a student that writes calls of its own would need their results, and nothing executes "
                    "tools: set it to 0"
                )
            if self.distill.loss.kd > 0 and self.distill.loss.divergence in WHOLE:
                raise ValueError(
                    f"distill.loss.divergence = {self.distill.loss.divergence!r} compares one answer a row, and a trace has "
                    "several: set loss.kd = 0, or take a teacher with the student's tokenizer"
                )
            if self.baselines.few_shot:
                raise ValueError(
                    "baselines.few_shot puts single answers before a prompt, and rows are traces: leave it out"
                )
        live = "top-k" if self.teacher.backend == "openai" else "dense"
        if self.distill.on_policy and not (self.score.kind == live and self.distill.loss.kd > 0):
            raise ValueError(
                f'distill.on_policy needs the teacher beside the student: set score.kind = "{live}" and loss.kd above 0'
            )
        if self.distill.on_policy and self.distill.loss.divergence in WHOLE:
            raise ValueError(
                f"with distill.loss.divergence = {self.distill.loss.divergence!r} the teacher reads the kept text in its own "
                "tokens, and cannot read what the student writes: set on_policy to 0"
            )
        if self.distill.on_policy and self.distill.think_weight != 1.0:
            raise ValueError(
                "distill.think_weight cannot be told of what the student writes: set it to 1, or on_policy to 0"
            )
        if self.heal is not None and self.heal.curriculum == "confidence":
            raise key_error(
                "heal.curriculum",
                'rows that heal have no distributions of the teacher: order them by "length", "loss" or "evolution"',
            )
        if self.distill.curriculum == "confidence" and self.score.kind in ("none", "dense"):
            raise key_error(
                "distill.curriculum",
                f'score.kind = "{self.score.kind}" stores no distributions to tell how sure the teacher is: take "loss", or '
                'score.kind = "sampled"',
            )
        if self.round and not any(one.kind == "reference" for one in self.filter):
            raise key_error(
                "round.0.kind", 'nothing tells right answers from wrong ones: add [[filter]] kind = "reference"'
            )
        if self.round and self.generate.style == "rationale":
            raise key_error(
                "round.0.kind",
                'a student of generate.style = "rationale" writes no rationales to learn from: take "think", or no rounds',
            )
        if self.score.kind == "none" and self.distill.loss.kd > 0:
            raise ValueError('score.kind = "none" leaves no distributions: set distill.loss.kd = 0')
        loss = self.distill.loss
        if loss.kd > 0 and (found := problem(loss.divergence, loss.share, self.score.kind, loss.temperature)):
            raise ValueError(f"distill.loss.divergence: {found[0]}: {found[1]}")
        drawn_at = self.score.temperature or loss.temperature
        if loss.kd > 0 and self.score.kind in DRAWN and abs(drawn_at - loss.temperature) > REACH + 1e-9:
            raise key_error(
                "score.temperature",
                f"draws at temperature {drawn_at:g} cannot be re-weighted to distill.loss.temperature = {loss.temperature:g}: "
                f"{REACH:g} apart at most; leave it out, and they are drawn at the loss's",
            )
        if self.baselines.few_shot and not self.adapt:
            raise ValueError("baselines.few_shot takes its examples from adapt.files: add [adapt], or leave it out")
        return self

    @property
    def stores_targets(self) -> bool:
        """Tell whether the teacher's distributions are stored: where the loss, or the order of the rows, asks for them."""
        wanted = self.distill.loss.kd > 0 or self.distill.curriculum == "confidence"
        return wanted and self.score.kind not in ("none", "dense")


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe; ``overrides`` are dotted keys of ``--set``. Raises RecipeError with file, line and key."""
    return load_toml(path, Recipe, overrides=overrides)
