"""Which prompts the teacher answers: the recipe's ``[prompts]`` and its ``[[prompts.augment]]`` tables, applied in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from edgedistill.data.augmenters import STANCES
from edgedistill.recipe_base import Count, Rows, Section, Tabled
from edgedistill.toml_source import key_error

ASKED = ("temperature", "top_p", "max_new_tokens", "seed")
"""How the teacher is asked for new prompts."""
Text = Annotated[str, Field(min_length=1)]


class Augment(Section):
    """Make new prompts of those before. ``variations`` puts an instruction after a prompt. The teacher writes the others:
    ``paraphrase`` other words, ``self-instruct`` others of the kind, ``evol-instruct`` harder ones, ``textbook`` requests for
    sections with exercises, ``edge-cases`` unusual ones, ``red-team`` what is to be refused, asked back or helped with all the
    same. They have no references, and inherit split, tags and system message of the prompt that they are made of.
    """

    OWN: ClassVar[dict[str, tuple[str, ...]]] = {
        "variations": ("to",),
        "paraphrase": ("n", *ASKED),
        "self-instruct": ("total", "shown", "similarity", *ASKED),
        "evol-instruct": ("rounds", "ways", *ASKED),
        "textbook": ("n", "audiences", "exercises", *ASKED),
        "edge-cases": ("n", "cases", *ASKED),
        "red-team": ("n", "balance", *ASKED),
    }
    """What each kind may be told, beside ``rows`` and ``of``."""

    kind: Literal["variations", "paraphrase", "self-instruct", "evol-instruct", "textbook", "edge-cases", "red-team"]
    of: Literal["all", "files"] = Field(
        default="all", description="files: of the rows of prompts.files alone, not of what augmenters before made"
    )
    rows: Count | None = Field(default=None, description="of so many prompts, evenly spaced; none: of all")
    n: Count = Field(
        default=1, description="paraphrase, textbook, edge-cases, red-team: so many new prompts of each one"
    )
    to: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=("a beginner", "in detail", "with examples", "in one sentence"),
        description='variations: for whom or how to answer; a whole sentence ("Use no jargon.") stays as it is',
    )
    total: Count = Field(default=100, description="self-instruct: so many new prompts in all")
    shown: Count = Field(default=8, description="self-instruct: prompts that the teacher is shown at a time")
    similarity: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.7, description="self-instruct: ROUGE-L with any other prompt from which on one is not new"
    )
    rounds: Count = Field(default=1, description="evol-instruct: how often each prompt is evolved")
    ways: Annotated[
        tuple[Literal["constraints", "depth", "concreteness", "reasoning", "breadth"], ...], Field(min_length=1)
    ] = Field(
        default=("constraints", "depth", "concreteness", "reasoning", "breadth"),
        description="evol-instruct: how; one is drawn for each prompt and round",
    )
    audiences: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default=("a curious child", "a beginner", "an undergraduate"),
        description="textbook: whom sections are for; one is drawn for each",
    )
    exercises: Count = Field(default=2, description="textbook: at the end of each section")
    cases: Annotated[
        tuple[Literal["empty", "contradiction", "typos", "units", "boundary", "ambiguous"], ...], Field(min_length=1)
    ] = Field(
        default=("empty", "contradiction", "typos", "units", "boundary", "ambiguous"),
        description="edge-cases: what is unusual",
    )
    balance: dict[Literal["helpful", "refusing", "nuanced"], Annotated[float, Field(ge=0)]] = Field(
        default={"helpful": 1, "refusing": 1, "nuanced": 1},
        description="red-team: how the right answers are shared out",
    )
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_new_tokens: Count = 512
    seed: int | None = Field(default=None, description="of what is drawn; none: the recipe's")

    @field_validator("balance")
    @classmethod
    def _some(cls, balance: dict[str, float]) -> dict[str, float]:
        if not any(balance.values()):
            raise ValueError("all weights are 0: no prompt would be asked for")
        # in one order, by which they are shared out: keys know none
        return {name: weight for name in STANCES if (weight := balance.get(name))}

    @model_validator(mode="after")
    def _fits(self) -> Augment:
        for name in dict.fromkeys(name for names in self.OWN.values() for name in names):
            if name in self.model_fields_set and name not in self.OWN[self.kind]:
                whose = " or ".join(f'"{kind}"' for kind, names in self.OWN.items() if name in names)
                raise key_error(name, f"this is for kind = {whose}")
        again = self.n > 1 and (self.kind in ("paraphrase", "red-team") or self.n > len(self.cases))
        if again and self.temperature == 0 and self.kind != "textbook":
            raise key_error("n", "at temperature 0 all of them are the same: set temperature")
        return self

    def settings(self) -> dict[str, object]:
        """Return what makes the prompts beside how the teacher is asked: the kind, and what it is told."""
        told = [name for name in self.OWN[self.kind] if name not in ASKED]
        found = self.model_dump(include={"kind", *told})
        more = {name: getattr(self, name) for name in ("of", "rows")}
        return found | {name: value for name, value in more.items() if value != type(self).model_fields[name].default}


class Prompts(Tabled):
    """The prompts that the teacher answers: JSONL, JSON, CSV, TSV or Parquet with id, messages | prompt, reference, tags, split; or
    with columns of one's own, and a ``template``. "hf:OWNER/NAME/data/train.parquet" is a file of a data set of the hub, pinned in
    ``NAME.lock``. ``rows`` are before augmenting.
    """

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None
    augment: tuple[Augment, ...] = ()
