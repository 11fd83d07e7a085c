"""The protocol of runners, and what they share: answers, chat templates, token rows."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from edgedistill.data.prompts import Message, Row
from edgedistill.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[int, int, str], None]
Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Hold one answer: its text, its token ids (without the end token) and why it ended.

    ``seconds`` is the row's share of its batch, for totals; a latency is measured by devices/.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    seconds: float
    finish: Finish

    @property
    def tokens(self) -> int:
        """Return the number of generated tokens."""
        return len(self.token_ids)


class Runner(Protocol):
    """Answer prompts greedily and give log-probabilities, whatever the engine."""

    def describe(self) -> dict[str, Any]:
        """Name engine, build, instruction set and settings: what an accuracy depends on."""
        ...

    def encode(self, row: Row) -> list[int]:
        """Return the token ids of the row's prompt, chat template applied, ready for the answer."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of an answer's text (nothing added), special tokens parsed."""
        ...

    def end_token(self) -> int:
        """Return the id that ends an answer."""
        ...

    def pieces(self) -> list[str]:
        """Return the text of every token as the vocabulary writes it, by id; the logits have as many columns."""
        ...

    def answer(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        grammar: str | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer every row greedily, in the order of ``rows``. ``grammar`` is GBNF text."""
        ...

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: str | None = None
    ) -> None:
        """Take what this model answered in an earlier process, as if it had been now: what follows is then the same."""
        ...

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per row the log-probabilities of the token *after* each position: float32 [positions, vocabulary]."""
        ...

    def continued(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per prompt the log-probability of each of the ``tails`` (token ids) as what follows it: float64 [tails]."""
        ...

    def close(self) -> None:
        """Free the model. May be called twice."""
        ...


def continued_by_rows(
    runner: Runner, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """Do what ``continued`` does by whole rows of prompt and tail: each prompt is read once for every tail."""
    import numpy as np

    for prompt in prompts:
        positions = [range(len(prompt) - 1, len(prompt) + len(tail) - 1) for tail in tails]
        found = runner.logprobs([[*prompt, *tail] for tail in tails], positions)
        sums = [
            float(one[np.arange(len(tail)), list(tail)].sum(dtype=np.float64))
            for one, tail in zip(found, tails, strict=True)
        ]
        yield np.asarray(sums)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """Accept {% generation %}, with which templates mark the assistant's tokens; it prints its body."""

        tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

        def _print(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        # jinja2's own filter escapes <, > and &, which changes the prompt.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    # The settings of transformers.utils.chat_template_utils: one template must give one text in both.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Message] = (),
    bos: str = "",
    eos: str = "",
    generation_prompt: bool = True,
) -> str:
    """Render a chat template the way transformers does, up to where the model starts to write.

    Runs in jinja2's sandbox: a template is a program that came with a model. Raises UsageError where it fails.
    """
    import jinja2

    try:
        return _compile(template).render(
            messages=list(messages),
            tools=list(tools) or None,
            documents=None,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=generation_prompt,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"the model's chat template refuses the conversation: {error}",
            "Check roles and their order; some templates take no system message, or no tools.",
        ) from None
