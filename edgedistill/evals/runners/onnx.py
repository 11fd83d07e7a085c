"""Answer prompts with onnxruntime-genai, and take log-probabilities with plain onnxruntime from the same files.

Prompts of a batch are padded on the *right*: group-query attention counts the tokens of a row from its start, and the
left padding that other runtimes want gives wrong answers without a word (seen with onnxruntime-genai 0.18).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.cpus import usable_cpus
from edgedistill.data.prompts import Message, Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.runners.base import Answer, Finish, Progress, continued_by_rows
from edgedistill.evals.runners.gguf_session import log_softmax

BATCH = 16


def require_onnx() -> None:
    """Raise UsageError where the packages of the ``onnx`` extra are missing."""
    try:
        import onnxruntime  # noqa: F401
        import onnxruntime_genai  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ONNX needs {error.name or 'onnxruntime-genai'}", "pip install 'edgedistill[onnx]'") from None


class OnnxRunner:
    """Run a folder that onnxruntime-genai's builder wrote, on the CPU.

    ``threads`` defaults to the cores this process may use. Raises UsageError where the extra is missing, StepFailed for
    a folder that does not load.
    """

    def __init__(self, path: Path, *, threads: int | None = None, batch: int = BATCH) -> None:
        require_onnx()
        import onnxruntime_genai

        lib: Any = onnxruntime_genai
        self.path, self.batch = Path(path), max(1, batch)
        self.threads = threads or usable_cpus()
        try:
            self._config: dict[str, Any] = json.loads((self.path / "genai_config.json").read_text())["model"]
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"{path}: no readable genai_config.json: {error}", "Build the ONNX folder again."
            ) from None
        self._lib = lib
        try:
            config = lib.Config(str(self.path))
            config.overlay(
                json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": self.threads}}}})
            )
            self._model: Any = lib.Model(config)
            self._tokenizer: Any = lib.Tokenizer(self._model)
        except Exception as error:  # the binding raises RuntimeError and, for some files, its own type
            raise StepFailed(
                f"{path}: onnxruntime-genai cannot load it: {str(error).splitlines()[0]}",
                "Build the ONNX folder again.",
            ) from None
        self._session: Any = None
        ends = self._config.get("eos_token_id", [])
        self._ends: list[int] = list(ends) if isinstance(ends, list) else [int(ends)]
        self._end: int | None = None
        self.context_limit = int(self._config.get("context_length", 2048))

    def __enter__(self) -> OnnxRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. May be called twice."""
        self._model = self._tokenizer = self._session = None

    def describe(self) -> dict[str, Any]:
        """Name the engine and its versions."""
        from importlib.metadata import version

        build = {name: version(name) for name in ("onnxruntime", "onnxruntime-genai")}
        return {"engine": "onnxruntime-genai", "build": build, "batch": self.batch}

    # -- tokens -----------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], *, tools: Sequence[Message] = (), generation: bool = True) -> str:
        """Render the folder's chat template with the runtime's own engine: what an app on the device gets."""
        options = {"tools": json.dumps(list(tools))} if tools else {}
        try:
            return self._tokenizer.apply_chat_template(
                json.dumps(list(messages)), add_generation_prompt=generation, **options
            )
        except Exception as error:
            raise UsageError(
                f"{self.path}: onnxruntime-genai cannot render the chat template: {str(error).splitlines()[0]}",
                "Check chat_template.jinja in the folder: this runtime knows a part of jinja2.",
            ) from None

    def encode(self, row: Row) -> list[int]:
        """Return the prompt's token ids by the folder's own tokenizer and chat template."""
        return self.encode_text(self.render(row.messages, tools=row.tools))

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text: special tokens parsed, none added."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def end_token(self) -> int:
        """Return the id with which the chat template ends an answer; the model's end of sequence where it has none."""
        if self._end is None:
            mark = "xyzzy"
            turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": mark}]
            rest = self.encode_text(self.render(turns, generation=False).rpartition(mark)[2])
            ends = [token for token in rest if token in self._ends]
            self._end = ends[0] if ends else self._ends[0]
        return self._end

    def pieces(self) -> list[str]:
        """Return the text of every token as the folder's tokenizer.json writes it."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.path / "tokenizer.json"))
        size = int(self._config.get("vocab_size", tokenizer.get_vocab_size()))
        return [tokenizer.id_to_token(token) or f"[PAD{token}]" for token in range(size)]

    # -- answers ----------------------------------------------------------------------------------------------------

    def answer(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        grammar: str | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer every row greedily, in the order of ``rows``; rows of similar length share a batch.

        Raises UsageError for a grammar (the runtime reads no GBNF) and for a prompt that leaves no room for an answer.
        """
        if grammar is not None:
            raise UsageError("onnxruntime-genai reads no GBNF grammar", "Evaluate the GGUF under the grammar.")
        prompts = [self.encode(row) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            if len(prompt) >= self.context_limit:
                raise UsageError(
                    f"row {row.id!r}: the prompt has {len(prompt)} tokens, the model's context {self.context_limit}",
                    "Shorten the prompt, or take the row out of the suite.",
                )
        order = sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            room = min(max_new_tokens, self.context_limit - max(len(prompts[i]) for i in part))
            began = time.perf_counter()
            found = self.generate([prompts[i] for i in part], max_new_tokens)
            seconds = (time.perf_counter() - began) / len(part)
            for i, tokens in zip(part, found, strict=True):
                stop = next((k for k, token in enumerate(tokens) if token in self._ends), None)
                # The end token of a batch's last answers is not appended: the generator is done, and stops short.
                finish: Finish = "stop"
                if stop is None and len(tokens) >= room:
                    finish = "length" if room == max_new_tokens else "context"
                tokens = tokens[:stop]
                text = str(self._tokenizer.decode(np.array(tokens, dtype=np.int32))) if tokens else ""
                answers[i] = Answer(id=rows[i].id, text=text, token_ids=tuple(tokens), seconds=seconds, finish=finish)
            if progress is not None:
                progress(len(answers), len(rows), "answers")
        return [answers[i] for i in range(len(rows))]

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue token ids greedily as one batch; the end token, if any, and padding after it included."""
        pad = int(self._config["pad_token_id"])
        width = max(len(prompt) for prompt in prompts)
        ids = np.array([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts], dtype=np.int32)
        params = self._lib.GeneratorParams(self._model)
        params.set_search_options(
            max_length=min(width + max_new_tokens, self.context_limit),
            batch_size=len(prompts),
            # A folder's search settings may sample: greedy means none of them.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
        )
        try:
            generator = self._lib.Generator(self._model, params)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            return [[int(t) for t in generator.get_sequence(i)[width:]] for i in range(len(prompts))]
        except Exception as error:
            raise StepFailed(
                f"{self.path}: onnxruntime-genai failed while running: {str(error).splitlines()[0]}",
                "Build the ONNX folder again, with another type if it stays.",
            ) from None

    # -- log-probabilities ------------------------------------------------------------------------------------------

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: str | None = None
    ) -> None:
        """Do nothing: no answer depends on those before it."""

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per row float32 [len(positions[i]), vocabulary]: the distribution of the token after each position."""
        for tokens, wanted in zip(token_rows, positions, strict=True):
            yield log_softmax(self.logits(tokens)[list(wanted)])

    def continued(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per prompt the log-probability of each of the ``tails`` as what follows it: float64 [tails]."""
        return continued_by_rows(self, prompts, tails)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after every token by plain onnxruntime: float32 [tokens, vocabulary]."""
        if len(tokens) > self.context_limit:
            raise UsageError(
                f"a row has {len(tokens)} tokens, the model's context {self.context_limit}",
                "Shorten it, or leave it out.",
            )
        decoder = self._config["decoder"]
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(
                str(self.path / decoder["filename"]), options, providers=["CPUExecutionProvider"]
            )
        ids = np.array([list(tokens)], dtype=np.int64)
        shape = (1, int(decoder["num_key_value_heads"]), 0, int(decoder["head_size"]))
        feeds: dict[str, np.ndarray] = {}
        for item in self._session.get_inputs():
            if item.name == decoder["inputs"]["input_ids"]:
                feeds[item.name] = ids
            elif item.name == decoder["inputs"]["attention_mask"]:
                feeds[item.name] = np.ones_like(ids)
            elif item.name == decoder["inputs"].get("position_ids"):
                feeds[item.name] = np.arange(ids.shape[1], dtype=np.int64)[None]
            else:
                kind = np.float16 if "float16" in item.type else np.float32
                feeds[item.name] = np.zeros(shape, dtype=kind)
        return self._session.run([decoder["outputs"]["logits"]], feeds)[0][0].astype(np.float32, copy=False)
