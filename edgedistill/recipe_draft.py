"""The table of a draft model for speculative decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgedistill.recipe_base import Count, Positive, Rows, Shaped, Skip, Tabled, Training
from edgedistill.recipe_distill import Loss
from edgedistill.toml_source import key_error

UNLOADABLE = {
    "eagle": "llama.cpp's library hands the states that an EAGLE head reads to nobody but its own programs: such a head could "
    'be neither run nor measured here; take kind = "model"',
    "medusa": 'llama.cpp cannot load Medusa heads; take kind = "model"',
}
"""Heads for speculative decoding that people ask for by name, and why they are refused (llama-cpp-python 0.3.36)."""


class Draft(Tabled, Shaped, Training):
    """A draft model for speculative decoding: cut out of the merged student, trained in full on what the quantized file of each
    target writes, with the student's distributions; then measured beside that file. One that brings nothing is not shipped.
    """

    LATER = Training.LATER

    kind: Literal["model"] = "model"
    targets: Annotated[tuple[str, ...], Field(min_length=1, description="whose files: GGUF targets of this recipe")]
    layers: Literal["all"] | Count | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = 2
    files: tuple[Path, ...] = Field(
        default=(),
        description="rows whose prompts the file answers for the draft to learn from; none: those of [prompts]",
    )
    rows: Rows = None
    skip: Skip = 0
    loss: Loss = Loss()
    epochs: Positive = 3.0
    lr: Positive = 6e-4
    type: str = Field(default="Q8_0", description="GGUF type of the draft")
    tokens: Count = Field(default=3, description="the most tokens that it writes before they are checked")
    min_probability: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="it stops before a token that it gives less"
    )

    @field_validator("kind", mode="before")
    @classmethod
    def _loadable(cls, kind: Any) -> Any:
        if str(kind).lower().rstrip("0123456789") in UNLOADABLE:
            raise ValueError(UNLOADABLE[str(kind).lower().rstrip("0123456789")])
        return kind

    @model_validator(mode="after")
    def _a_draft(self) -> Draft:
        if self.vocabulary is not None:
            raise key_error("vocabulary", "a draft writes the tokens of the model that checks it: leave the key out")
        if self.layers == "all" and self.ffn is None:
            raise ValueError("a draft with all layers and neurons is as slow as the model itself: set layers, or ffn")
        if self.files == () and (self.rows is not None or self.skip != 0):
            raise ValueError("rows and skip count rows of draft.files, and there are none")
        return self
