"""What a teacher can be asked: to write, and to score. Every backend answers in these words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from edgedistill.training.data import Example
from edgedistill.training.targets import Kind, SparseTargets

Messages = Sequence[dict[str, Any]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. ``index`` is the place of its prompt in the request; ``token_ids`` are without the end-of-turn token.

    ``logprob`` is the sum of the log-probabilities, at temperature 1, of the tokens written, the end-of-turn token
    included. A server gives no ids: there ``tokens`` is their number, and ``calls`` of tools, name and arguments as it wrote them,
    stand beside the text (``calls.py``).
    """

    index: int
    row_id: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprob: float
    tokens: int | None = None
    calls: tuple[dict[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "token_ids": list(self.token_ids)}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to write. ``temperature`` 0 is greedy; ``samples`` answers a prompt (greedy: one)."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0


@runtime_checkable
class Teacher(Protocol):
    """A source of text, and of distributions where the backend gives them."""

    def generate(
        self,
        prompts: Sequence[Messages] | Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        row_ids: Sequence[str] | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[list[Answer]], None] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Answer]:
        """Write ``sampling.samples`` answers to each prompt; ``on_batch`` gets each finished batch."""
        ...

    def score(
        self,
        examples: Sequence[Example],
        *,
        kind: Kind,
        n: int,
        temperature: float,
        seed: int,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, SparseTargets]]:
        """Yield (index of the example, its soft targets) over the tokens of the examples' completions."""
        ...
