"""Answer prompts with llama.cpp, many at once: what makes an evaluation of a thousand prompts take a minute, not ten.

One context holds many sequences. The tokens that all prompts share (system message, examples) are decoded once and
copied; each step then decodes one token of every running answer, so that matrices are multiplied by wide batches.
Greedy, so an answer depends on its neighbours in the batch only where two logits are equal to rounding.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.cpus import usable_cpus
from edgedistill.data.prompts import Message, Row
from edgedistill.errors import UsageError
from edgedistill.evals.runners.base import Answer, Finish, Progress, render_chat
from edgedistill.evals.runners.gguf_session import BATCH, Session, Slot, log_softmax, padded
from edgedistill.evals.runners.grammar import Grammar
from edgedistill.kv_cache import F16, Pair, told, value_bytes

PARALLEL = 64
REFILL = 8  # free places to wait for: prompts that start together are decoded together
CACHE_BYTES = 512 * 2**20  # of KV cache: fewer answers run at once where they would need more
LOGIT_ROWS = 192  # rows of the vocabulary held at once by logprobs: 38 MB at 49k tokens, 117 MB at 152k


Pick = Callable[[Sequence[tuple[int, int]], np.ndarray], Sequence[int] | np.ndarray]
"""((index of the prompt, tokens written so far) of each row, logits [rows, vocabulary]) -> the next tokens."""
OnTokens = Callable[[Sequence[int], Sequence[int]], None]
OnEnd = Callable[[int, Sequence[int], Finish], None]


def greedy(places: Sequence[tuple[int, int]], logits: np.ndarray) -> np.ndarray:
    """Return the likeliest tokens."""
    return logits.argmax(axis=1)


class GgufRunner:
    """Run one GGUF file on the CPU through llama.cpp.

    ``threads`` defaults to the cores this process may use; at most ``parallel`` answers run at once; ``kv`` are the types of the
    KV cache. Raises UsageError for a file that llama.cpp cannot load.
    """

    def __init__(self, path: Path, *, threads: int | None = None, parallel: int = PARALLEL, kv: Pair = F16) -> None:
        import llama_cpp

        from edgedistill.formats.gguf.model_io import open_model

        self.path = Path(path)
        self.threads = threads or usable_cpus()
        self.parallel = max(1, min(parallel, 200))
        self.kv = kv
        self._lib: Any = llama_cpp
        self._llama: Any = open_model(self.path, n_ctx=32, threads=self.threads)
        self._model: Any = self._llama._model.model
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._end: int | None = None
        self._texts: dict[int, bytes] = {}
        self._free: dict[tuple[tuple[int, ...], int], Answer] = {}  # (prompt, budget) -> answer without a grammar
        self.context_limit = int(llama_cpp.llama_model_n_ctx_train(self._model))

    def __enter__(self) -> GgufRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model. May be called twice."""
        if self._llama is not None:
            self._llama.close()
            self._llama = self._model = self._vocab = None

    def describe(self) -> dict[str, Any]:
        """Name the engine, its build and its settings: they change roundings, and so a few answers."""
        from edgedistill.formats.gguf.model_io import library_build

        kv = {} if self.kv == F16 else {"kv_cache": told(self.kv)}
        return {"engine": "llama.cpp", "build": library_build(), "parallel": self.parallel, **kv}

    # -- tokens -----------------------------------------------------------------------------------------------------

    def _piece(self, token: int, *, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text: special tokens parsed, none added."""
        data = text.encode("utf-8", "replace")
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), False, True)
        if n < 0:
            raise UsageError(f"{self.path}: llama.cpp cannot tokenize a prompt of {len(data)} bytes", "Shorten it.")
        return list(buffer[:n])

    def encode(self, row: Row) -> list[int]:
        """Return the prompt's token ids under the file's own chat template. Raises UsageError where it has none."""
        return self.encode_text(self._render(row.messages, tools=row.tools))

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        template = self._lib.llama_model_chat_template(self._model, None)
        if not template:
            raise UsageError(
                f"{self.path}: has no chat template", "Convert it from a folder whose tokenizer has a chat template."
            )
        for name, token in (
            ("bos", self._lib.llama_vocab_bos(self._vocab)),
            ("eos", self._lib.llama_vocab_eos(self._vocab)),
        ):
            options[name] = self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""
        return render_chat(template.decode("utf-8"), messages, **options)

    def end_token(self) -> int:
        """Return the id with which the chat template ends an answer; the file's end of sequence where there is none.

        llama.cpp's own end of turn is a guess by name: for SmolLM2 it is <|endoftext|>, which no answer ends with.
        """
        if self._end is None and not self.has_template():
            self._end = int(self._lib.llama_vocab_eos(self._vocab))
        if self._end is None:
            mark = "xyzzy"
            turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": mark}]
            rest = self.encode_text(self._render(turns, generation_prompt=False).rpartition(mark)[2])
            ends = [token for token in rest if self._lib.llama_vocab_is_eog(self._vocab, token)]
            self._end = ends[0] if ends else int(self._lib.llama_vocab_eos(self._vocab))
        return self._end

    def has_template(self) -> bool:
        """Tell whether the file says how a conversation is written."""
        return bool(self._lib.llama_model_chat_template(self._model, None))

    def around_user(self) -> tuple[list[int], list[int]]:
        """Return the token ids before and behind a user's first message. Where the chat template has nothing before it, or there
        is none, a text begins as ``first_token`` says, else with the end of one.
        """
        from edgedistill.formats.gguf.read import first_token

        first = first_token(self.path) or [self.end_token()]
        if not self.has_template():
            return first, []
        mark = "xyzzy"
        before, _, behind = self._render([{"role": "user", "content": mark}]).partition(mark)
        return self.encode_text(before) or first, self.encode_text(behind)

    # -- answers ----------------------------------------------------------------------------------------------------

    def pieces(self) -> list[str]:
        """Return the text of every token as the file's vocabulary writes it."""
        return [
            self._lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")
            for token in range(self.vocabulary)
        ]

    def answer(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        grammar: str | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answer every row greedily, in the order of ``rows``. With ``grammar`` (GBNF) only what it allows is decoded.

        A free answer that this runner has already given, and that the grammar allows token by token, is the greedy answer
        under the grammar too, and is not decoded again. Raises UsageError for a prompt that leaves no room for an answer,
        or a grammar that llama.cpp refuses.
        """
        if not rows:
            return []
        prompts = [self.encode(row) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            if len(prompt) >= self.context_limit:
                raise UsageError(
                    f"row {row.id!r}: the prompt has {len(prompt)} tokens, the model's context {self.context_limit}",
                    "Shorten the prompt, or take the row out of the suite.",
                )
        started = time.perf_counter()
        root = self.grammar(grammar) if grammar is not None else None
        answers: dict[int, Answer] = {}
        if root is not None:
            given = self._allowed(prompts, max_new_tokens, root)
            answers = {index: dataclasses.replace(answer, id=rows[index].id) for index, answer in given.items()}

        def take(index: int, tokens: Sequence[int], finish: Finish) -> None:
            answers[index] = Answer(
                id=rows[index].id, text=self.text(tokens), token_ids=tuple(tokens), seconds=0.0, finish=finish
            )
            if progress is not None:
                progress(len(answers), len(rows), "answers")

        try:
            self.write(
                prompts, max_new_tokens=max_new_tokens, on_end=take, root=lambda index: root, done=answers.keys()
            )
        finally:
            if root is not None:
                root.close()
        found = [answers[i] for i in range(len(rows))]
        if grammar is None:
            self._keep(prompts, found, max_new_tokens)
        return _share_seconds(found, time.perf_counter() - started)

    def remember(
        self, rows: Sequence[Row], answers: Sequence[Answer], *, max_new_tokens: int, grammar: str | None = None
    ) -> None:
        """Take free answers of an earlier process for those that a grammar may allow."""
        if grammar is None:
            self._keep([self.encode(row) for row in rows], answers, max_new_tokens)

    def _keep(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], max_new_tokens: int) -> None:
        self._free |= {(tuple(prompt), max_new_tokens): answer for prompt, answer in zip(prompts, answers, strict=True)}

    def grammar(self, text: str) -> Grammar:
        """Return a grammar (GBNF) at its start; ``close`` it when done. Raises UsageError for what is none."""
        return Grammar(self._vocab, text, self.vocabulary)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens; special tokens are none."""
        for token in tokens:
            if token not in self._texts:
                self._texts[token] = self._piece(token, special=False)
        return b"".join(self._texts[token] for token in tokens).decode("utf-8", "replace")

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        on_end: OnEnd,
        on_start: Callable[[int], None] = lambda index: None,
        pick: Pick = greedy,
        on_tokens: OnTokens = lambda rows, tokens: None,
        root: Callable[[int], Grammar | None] = lambda index: None,
        done: Collection[int] = (),
    ) -> None:
        """Continue token ids, long prompts first, many at once; those whose index is ``done`` are left out.

        ``on_start`` gets the index of a prompt when it is put, ``on_end`` its tokens when it ends, in that order of time;
        ``pick`` chooses the tokens; one that the grammar of a prompt forbids (``root``) gives way to the likeliest that it allows.
        ``on_tokens`` gets the rows of the logits that ``pick`` saw, and what was written after each, the end of an answer included.
        Prompts fit the context. Raises StepFailed where llama.cpp does not decode.
        """
        todo = set(range(len(prompts))) - set(done)
        if not todo:
            return
        shared = _common_prefix(prompts)
        depth = min(max(len(p) for p in prompts) + max_new_tokens, self.context_limit)
        slots = max(1, min(self.parallel, len(prompts), CACHE_BYTES // (padded(depth) * self._cell_bytes())))
        session = Session(self, sequences=slots + 1, depth=depth)
        # Long prompts first, equal lengths together: llama.cpp cuts a batch into pieces of equal length per sequence.
        waiting = sorted(todo, key=lambda i: (len(prompts[i]), i))
        running: list[Slot] = []  # in the order of their sequences, 1, 2, ...; sequence 0 keeps the shared tokens
        try:
            session.prefill([(0, prompts[0][:shared], 0)])
            while waiting or running:
                fresh: list[Slot] = []
                if waiting and slots - len(running) >= min(REFILL, slots):
                    for sequence in range(len(running) + 1, slots + 1)[: len(waiting)]:
                        index = waiting.pop()
                        on_start(index)
                        budget = min(max_new_tokens, self.context_limit - len(prompts[index]))
                        grammar = root(index)
                        state = grammar.clone() if grammar is not None else None
                        fresh.append(Slot(sequence, index, len(prompts[index]), budget, state))
                        session.copy(0, sequence)
                    logits = session.prefill([(s.sequence, prompts[s.index][shared:], shared) for s in fresh])
                    ended = self._choose(fresh, logits, pick, on_tokens)
                else:
                    logits = session.step([(s.sequence, s.tokens[-1], s.position) for s in running])
                    for slot in running:
                        slot.position += 1
                    ended = self._choose(running, logits, pick, on_tokens)
                for slot, _ in ended:
                    session.forget(slot.sequence)
                    if slot.grammar is not None:
                        slot.grammar.close()
                gone = {slot.sequence for slot, _ in ended}
                running = session.close_gaps([slot for slot in (*running, *fresh) if slot.sequence not in gone])
                for slot, finish in ended:
                    on_end(slot.index, slot.tokens, finish)
        finally:
            for slot in running:
                if slot.grammar is not None:
                    slot.grammar.close()
            session.close()

    def _allowed(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, root: Grammar) -> dict[int, Answer]:
        """Return the free answers of before that ``root`` allows, by the index of their prompt."""
        end = self.end_token()
        found: dict[int, Answer] = {}
        for index, prompt in enumerate(prompts):
            answer = self._free.get((tuple(prompt), max_new_tokens))
            if answer is None:
                continue
            state = root.clone()
            try:
                if state.allows([*answer.token_ids, *([end] if answer.finish == "stop" else [])]):
                    found[index] = answer
            finally:
                state.close()
        return found

    def _choose(
        self, slots: Sequence[Slot], logits: np.ndarray, pick: Pick, on_tokens: OnTokens
    ) -> list[tuple[Slot, Finish]]:
        """Give each slot its next token from ``logits`` [slots, vocabulary]; return those that end here, and why."""
        best = pick([(slot.index, len(slot.tokens)) for slot in slots], logits) if slots else ()
        done: list[tuple[Slot, Finish]] = []
        chosen: list[tuple[int, int]] = []
        for order, slot in enumerate(slots):
            token: int | None = int(best[order])
            if slot.grammar is not None:
                token = slot.grammar.choose(int(best[order]), logits[order])
            if token is not None:
                chosen.append((order, token))
            if token is None or self._lib.llama_vocab_is_eog(self._vocab, token):
                done.append((slot, "stop"))
                continue
            slot.tokens.append(token)
            if len(slot.tokens) >= slot.budget:
                full = slot.position + 1 >= self.context_limit
                done.append((slot, "context" if full else "length"))
        on_tokens([order for order, _ in chosen], [token for _, token in chosen])
        return done

    def _cell_bytes(self) -> int:
        """Return the bytes of one token in the KV cache."""
        lib, model = self._lib, self._model
        heads = max(1, int(lib.llama_model_n_head(model)))
        width = int(lib.llama_model_n_embd(model)) * int(lib.llama_model_n_head_kv(model)) // heads
        return max(1, round(int(lib.llama_model_n_layer(model)) * width * value_bytes(self.kv)))

    # -- log-probabilities ------------------------------------------------------------------------------------------

    def logprobs(self, token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per row float32 [len(positions[i]), vocabulary]: the distribution of the token after each position.

        Positions rise. Several rows decode together; about LOGIT_ROWS rows of the vocabulary are held at once. Raises
        UsageError for a row longer than the model's context.
        """
        if not token_rows:
            return
        depth = max(len(tokens) for tokens in token_rows)
        if depth > self.context_limit:
            raise UsageError(
                f"a row has {depth} tokens, the model's context {self.context_limit}", "Shorten it, or leave it out."
            )
        together = max(1, min(16, len(token_rows), CACHE_BYTES // (padded(depth) * self._cell_bytes())))
        session = Session(self, sequences=together, depth=depth, batch=max(BATCH, depth))
        try:
            for group in _groups(token_rows, positions, session.batch_size, together):
                session.clear()
                logits = session.decode(
                    [
                        (sequence, token, position, position in wanted)
                        for sequence, i in enumerate(group)
                        for wanted in (set(positions[i]),)
                        for position, token in enumerate(token_rows[i])
                    ]
                )
                start = 0
                for i in group:
                    yield log_softmax(logits[start : start + len(positions[i])])
                    start += len(positions[i])
        finally:
            session.close()

    def last_logprobs(
        self, token_rows: Sequence[Sequence[int]], count: int, *, kv: Pair, flash: bool = True
    ) -> Iterator[np.ndarray]:
        """Yield per row float32 [count, vocabulary]: the distributions after its last ``count`` tokens, with a KV cache of these
        types, and with flash attention or without. One row at a time, in pieces, so that a row may be as long as the model's
        context.
        """
        session = Session(self, sequences=1, depth=max(map(len, token_rows)), kv=kv, flash=flash)
        try:
            for row in token_rows:
                session.clear()
                items = [(0, token, at, at >= len(row) - count) for at, token in enumerate(row)]
                pieces = [session.decode(items[at : at + BATCH]).copy() for at in range(0, len(items), BATCH)]
                yield log_softmax(np.concatenate(pieces))
        finally:
            session.close()

    def continued(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield per prompt the log-probability of each of the ``tails`` as what follows it: float64 [tails].

        What all prompts share is read once, the rest of each once, and its cache is copied for every tail. Raises UsageError for a
        prompt that leaves no room.
        """
        if not prompts:
            return
        depth = max(map(len, prompts)) + max(map(len, tails))
        if depth > self.context_limit:
            raise UsageError(
                f"a row has {depth} tokens, the model's context {self.context_limit}", "Shorten it, or leave it out."
            )
        shared = _common_prefix(prompts)
        room = CACHE_BYTES // (padded(depth) * self._cell_bytes()) - 2
        together = max(1, min(self.parallel, len(tails), room))
        session = Session(self, sequences=together + 2, depth=depth, batch=max(BATCH, depth))
        try:
            session.prefill([(0, prompts[0][:shared], 0)])
            for prompt in prompts:
                session.forget(1)
                session.copy(0, 1)
                first = log_softmax(session.prefill([(1, prompt[shared:], shared)]))[0]
                sums = np.asarray([float(first[tail[0]]) for tail in tails])
                for start in range(0, len(tails), together):
                    part = range(start, min(start + together, len(tails)))
                    for sequence, at in enumerate(part, 2):
                        if len(tails[at]) > 1:
                            session.forget(sequence)
                            session.copy(1, sequence)
                    for at, added in zip(
                        part, self._tails(session, [tails[at] for at in part], len(prompt)), strict=True
                    ):
                        sums[at] += added
                yield sums
        finally:
            session.close()

    def _tails(self, session: Session, tails: Sequence[Sequence[int]], start: int) -> list[float]:
        """Return what the tokens after the first of each tail add to its log-probability; tail i is read in sequence i + 2."""
        added = [0.0] * len(tails)
        items = [
            (number, token, start + offset)
            for number, tail in enumerate(tails)
            for offset, token in enumerate(tail[:-1])
        ]
        for low in range(0, len(items), min(LOGIT_ROWS, session.batch_size)):
            part = items[low : low + min(LOGIT_ROWS, session.batch_size)]
            found = log_softmax(session.step([(number + 2, token, position) for number, token, position in part]))
            for (number, _, position), row in zip(part, found, strict=True):
                added[number] += float(row[tails[number][position - start + 1]])
        return added


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts start with; one token is left to each, for its logits."""
    limit = min(len(p) for p in prompts) - 1
    first, n = prompts[0], max(limit, 0)
    for prompt in prompts:
        n = next((at for at in range(n) if prompt[at] != first[at]), n)
    return n


def _groups(
    token_rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], size: int, together: int
) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = wanted = 0
    for i, row in enumerate(token_rows):
        full = tokens + len(row) > size or wanted + len(positions[i]) > LOGIT_ROWS or len(group) >= together
        if group and full:
            yield group
            group, tokens, wanted = [], 0, 0
        group.append(i)
        tokens += len(row)
        wanted += len(positions[i])
    if group:
        yield group


def _share_seconds(answers: list[Answer], seconds: float) -> list[Answer]:
    each = seconds / sum(answer.tokens + 1 for answer in answers)
    return [dataclasses.replace(answer, seconds=each * (answer.tokens + 1)) for answer in answers]
