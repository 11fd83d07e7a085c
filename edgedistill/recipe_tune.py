"""The table of a recipe that says how quantized files are tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgedistill.recipe_base import Count, Positive, Rows, Skip, Tabled, Training
from edgedistill.toml_source import key_error


class OtherText(Tabled):
    """Rows that are not of the task, so that what is tuned for it is not lost elsewhere. One in five is held out."""

    files: Annotated[tuple[Path, ...], Field(min_length=1, description="rows with references, of no suite")]
    rows: Rows = None
    worse: Annotated[float, Field(ge=1)] = Field(
        default=1.0, description="so many times its divergence from the whole student a tuned file may have on them"
    )


class Tune(Tabled, Training):
    """Train quantized files towards the student that they were made from, whole: what rounding shifted is shifted back, and
    type, size and speed stay. ``skip`` leaves out the first so many rows of each file: text that the student was taught
    shows little of what rounding did.
    """

    LATER = (*Training.LATER, "parts", "code_lr", "scale_lr", "norm_lr", "general")

    targets: Annotated[tuple[str, ...], Field(min_length=1, description="whose files: GGUF targets of this recipe")]
    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    rows: Rows = None
    skip: Skip = 0
    parts: Literal["norms", "weights"] = Field(
        default="norms",
        description="the norms alone, or the codes and scales of every block with them (quantization-aware distillation)",
    )
    epochs: Positive = 1.0
    batch_size: Count = 8
    lr: Positive = Field(default=5e-4, description="of the norms, where they are tuned alone")
    code_lr: Positive = Field(
        default=1.5e-3, description="of the weights' places between the codes, in steps of the grid"
    )
    scale_lr: Positive = Field(default=1e-4, description="of the blocks' scales, as a share of each")
    norm_lr: Positive = Field(default=1e-4, description="of the norms, where blocks are tuned with them")
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.95
    general: OtherText | None = None

    @model_validator(mode="after")
    def _of_the_parts(self) -> Tune:
        if self.parts == "norms":
            for name in ("code_lr", "scale_lr", "norm_lr", "general"):
                if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                    raise key_error(name, f'{name} is of tuned blocks: set parts = "weights", or leave it out')
        elif self.general is None:
            raise key_error(
                "parts",
                "weights that are tuned to a task alone may lose the rest: name rows of other text in [tune.general] (files), "
                'or set parts = "norms"',
            )
        elif self.lr != type(self).model_fields["lr"].default:
            raise key_error("lr", "lr is of norms that are tuned alone: set code_lr, scale_lr or norm_lr")
        elif self.weight_decay:
            raise key_error("weight_decay", "codes and scales have no reason to be near 0: leave weight_decay out")
        return self
