"""Runners: batched answers are those of one row at a time, and log-probabilities are the model's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import UsageError
from edgedistill.evals.runners import open_runner
from edgedistill.evals.runners.base import Answer, render_chat
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.evals.runners.transformers import TransformersRunner

GRAMMAR = r"""root ::= "{\"n\":" [1-9] [0-9]? "}" """


def assert_greedy(path: Path, runner: GgufRunner, rows: list[Row], answers: list[Answer], within: float) -> None:
    """Require each token to be the best one, up to ``within``, when the row is decoded alone; each end too."""
    from edgedistill.formats.gguf.model_io import all_logits, open_model

    model = open_model(path, n_ctx=1024)
    for row, answer in zip(rows, answers, strict=True):
        prompt = runner.encode(row)
        logits = all_logits(model, [*prompt, *answer.token_ids], start=len(prompt) - 1)
        for token, step in zip(answer.token_ids, logits, strict=False):
            assert step.max() - step[token] <= within, row.id
        if answer.finish == "stop":
            assert logits[-1].max() - max(logits[-1][token] for token in (0, 2)) <= within, row.id
    model.close()


def test_batched_answers_are_greedy(tiny_file: Path, rows: list[Row]) -> None:
    found = []
    # 5 places for 30 rows: places are refilled and gaps closed many times.
    for parallel in (5, 64):
        with GgufRunner(tiny_file, parallel=parallel) as runner:
            answers = runner.answer(rows, max_new_tokens=12)
            assert_greedy(tiny_file, runner, rows, answers, 0.02)
        assert [answer.id for answer in answers] == [row.id for row in rows]
        assert all((answer.finish == "length") == (answer.tokens == 12) for answer in answers)
        found.append([answer.text for answer in answers])
    assert len(set(found[0])) > 20
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 27


def test_prompts_longer_than_a_batch(tiny_file: Path, rows: list[Row]) -> None:
    # 600 and more tokens that all share, then 600 that none does.
    shared = {"role": "system", "content": "7" * 620}
    long = [Row(id=str(i), messages=(shared, {"role": "user", "content": f"{i} go" * (1 + i)})) for i in range(3)]
    own = [Row(id=str(i), messages=({"role": "user", "content": str(i + 1) * (560 + i)},)) for i in range(3)]
    with GgufRunner(tiny_file) as runner:
        assert min(len(runner.encode(row)) for row in long + own) > 550
        for some in (long, own, [*own, *rows[:2]]):
            assert_greedy(tiny_file, runner, some, runner.answer(some, max_new_tokens=6), 0.02)


def test_the_context_ends_an_answer_or_refuses_a_prompt(tiny_file: Path) -> None:
    with GgufRunner(tiny_file) as runner:
        base = len(runner.encode(Row(id="a", messages=({"role": "user", "content": ""},))))
        row = Row(id="a", messages=({"role": "user", "content": "7" * (1020 - base)},))
        (answer,) = runner.answer([row], max_new_tokens=50)
        assert answer.finish in ("context", "stop")
        assert answer.tokens <= 4
        long = dataclasses.replace(row, id="long", messages=({"role": "user", "content": "7" * 1024},))
        with pytest.raises(UsageError, match=r"row 'long': the prompt has .* context 1024"):
            runner.answer([long], max_new_tokens=5)
        with pytest.raises(UsageError, match="context 1024"):
            list(runner.logprobs([[1] * 1025], [[3]]))
        assert runner.answer([], max_new_tokens=5) == []


def test_log_probabilities_are_the_models(tiny_file: Path, tiny_hf: Path, rows: list[Row]) -> None:
    from edgedistill.formats.gguf.model_io import all_logits, open_model

    with GgufRunner(tiny_file) as runner:
        token_rows = [runner.encode(row) for row in rows]
        positions = [range(len(ids) - 4, len(ids)) if i % 3 else range(len(ids)) for i, ids in enumerate(token_rows)]
        found = list(runner.logprobs(token_rows, positions))
        vocabulary = runner.vocabulary
        assert list(runner.logprobs([], [])) == []
    model = open_model(tiny_file, n_ctx=1024)
    with TransformersRunner(tiny_hf, dtype="float32") as other:
        theirs = list(other.logprobs(token_rows, positions))
    for ids, wanted, mine, hf in zip(token_rows, positions, found, theirs, strict=True):
        assert mine.shape == (len(wanted), vocabulary)
        assert np.exp(mine).sum(axis=1) == pytest.approx(1, abs=1e-5)
        logits = all_logits(model, ids)[list(wanted)].astype(np.float64)
        exact = logits - logits.max(1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(1, keepdims=True))
        assert np.abs(mine - exact).max() < 0.05  # the KV cache is f16
        assert np.abs(mine[:, : hf.shape[1]] - hf).max() < 0.05
    model.close()


def test_answers_under_a_grammar(tiny_file: Path, rows: list[Row]) -> None:
    with GgufRunner(tiny_file, parallel=4) as runner:
        free = runner.answer(rows[:9], max_new_tokens=16)
        answers = runner.answer(rows[:9], max_new_tokens=16, grammar=GRAMMAR)
        alone = [runner.answer([row], max_new_tokens=16, grammar=GRAMMAR)[0].text for row in rows[:9]]
        assert not any(answer.text.startswith('{"n":') for answer in free)
        for answer in answers:
            assert answer.finish == "stop"
            assert 0 <= json.loads(answer.text)["n"] <= 99
        assert [answer.text for answer in answers] == alone
        # A grammar that allows all characters changes nothing, but for answers that are no UTF-8.
        loose = runner.answer(rows[:9], max_new_tokens=16, grammar="root ::= [\\x01-\\U0010FFFF]*")
        pairs = [(a.text, b.text) for a, b in zip(free, loose, strict=True) if "\ufffd" not in a.text]
        assert pairs
        assert all(a == b for a, b in pairs)


def test_a_free_answer_that_the_grammar_allows_is_not_decoded_again(
    tiny_file: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedistill.evals.runners import gguf

    started: list[int] = []
    prefill = gguf.Session.prefill

    def counted(self: Any, parts: Any) -> Any:
        started.append(sum(sequence > 0 for sequence, _, _ in parts))
        return prefill(self, parts)

    monkeypatch.setattr(gguf.Session, "prefill", counted)
    some = [dataclasses.replace(row, id=f"again-{row.id}") for row in rows[:9]]
    loose = "root ::= [\\x01-\\U0010FFFF]*"
    with GgufRunner(tiny_file, parallel=4) as fresh:
        expected = {text: fresh.answer(some, max_new_tokens=16, grammar=text) for text in (loose, GRAMMAR)}
    with GgufRunner(tiny_file, parallel=4) as runner:
        free = runner.answer(rows[:9], max_new_tokens=16)
        clean = sum("\ufffd" not in answer.text for answer in free)
        assert clean
        for text, most in ((loose, 9 - clean), (GRAMMAR, 9)):
            started.clear()
            answers = runner.answer(some, max_new_tokens=16, grammar=text)
            assert [dataclasses.replace(a, seconds=0.0) for a in answers] == [
                dataclasses.replace(a, seconds=0.0) for a in expected[text]
            ]
            assert sum(started) <= most
        started.clear()
        runner.answer(some, max_new_tokens=15, grammar=loose)  # another budget: another answer
        assert sum(started) == 9
    with GgufRunner(tiny_file, parallel=4) as later:  # the same in another process, which is told of them
        later.remember(rows[:9], free, max_new_tokens=16)
        started.clear()
        later.answer(some, max_new_tokens=16, grammar=loose)
        assert sum(started) == 9 - clean


@pytest.mark.parametrize("text", ["root := [a-z]", "start ::= [a-z]", "root ::= missing", "root ::= root [a-z]", ""])
def test_a_wrong_grammar_is_refused(tiny_file: Path, rows: list[Row], text: str) -> None:
    with GgufRunner(tiny_file) as runner, pytest.raises(UsageError, match="grammar"):
        runner.answer(rows[:1], max_new_tokens=4, grammar=text)


def test_prompts_and_end_tokens_agree_between_engines(tiny_file: Path, tiny_hf: Path, rows: list[Row]) -> None:
    with open_runner(tiny_file) as mine, open_runner(tiny_hf, threads=2) as theirs:  # type: ignore[attr-defined]
        for row in rows[:5]:
            assert mine.encode(row) == theirs.encode(row)
            assert mine.encode_text(row.reference or "") == theirs.encode_text(row.reference or "")
        assert mine.end_token() == theirs.end_token() == 2
        assert mine.describe()["engine"] == "llama.cpp"
        assert mine.describe()["build"]
        assert theirs.describe()["engine"] == "transformers"


def test_transformers_answers(tiny_file: Path, tiny_hf: Path, rows: list[Row]) -> None:
    with TransformersRunner(tiny_hf, dtype="float32") as runner:
        answers = runner.answer(rows, max_new_tokens=8)
        with pytest.raises(UsageError, match="GBNF"):
            runner.answer(rows, max_new_tokens=8, grammar=GRAMMAR)
        with pytest.raises(UsageError, match="context"):
            list(runner.logprobs([[1] * 1025], [[3]]))
        assert runner.answer([], max_new_tokens=8) == []
    assert [answer.id for answer in answers] == [row.id for row in rows]
    with GgufRunner(tiny_file) as gguf:
        theirs = gguf.answer(rows, max_new_tokens=8)
    # The KV cache of llama.cpp is f16: a near tie may fall the other way.
    assert sum(a.text == b.text for a, b in zip(answers, theirs, strict=True)) >= 27


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model that can be run"):
        open_runner(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"x\.gguf"):
        open_runner(tmp_path / "x.gguf")


def test_templates_render_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{%- for message in messages %}\n"
        "    {%- if loop.first and message.role != 'system' %}{{ bos_token }}{% endif %}\n"
        "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}\n"
        "    {%- else %}[{{ message['role'] | upper }}] {{ message.content | trim }}\n"
        "    {% endif %}\n"
        "    {%- if loop.index > 9 %}{% break %}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    messages = [{"role": "user", "content": " <a> & 'b' "}, {"role": "assistant", "content": "c"}]
    messages.append({"role": "user", "content": "é"})
    tools: list[Any] = [{"name": "f", "quote": "<&'\">"}]
    ours = render_chat(template, messages, tools=tools, bos="<s>")
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert ours == theirs[0]
    with pytest.raises(UsageError, match="refuses the conversation: no system"):
        render_chat("{{ raise_exception('no system') }}", messages)
    with pytest.raises(UsageError, match="refuses"):
        render_chat("{{ messages.__class__.__mro__ }}", messages)  # a template is a program that came with a model
    with pytest.raises(UsageError, match="refuses"):
        render_chat("{% if %}", messages)


def test_the_real_model_decodes_in_batches_as_alone(smollm2_gguf: Path) -> None:
    import edgedistill.recipes

    folder = Path(edgedistill.recipes.__file__).parent / "quickstart" / "data"
    rows = load_rows(folder / "holdout.jsonl")[:6]
    with GgufRunner(smollm2_gguf, parallel=4) as runner:
        answers = runner.answer(rows, max_new_tokens=8)
        assert_greedy(smollm2_gguf, runner, rows, answers, 0.5)  # activations are rounded to 8 bits, by batch
        assert runner.end_token() == 2


def test_likelihoods_that_are_read_in_turns_leave_gradients_on(tiny_hf: Path, rows: list[Row]) -> None:
    """Two models read row by row beside each other: nothing of their inference mode stays behind, or reaches the reader."""
    import torch

    def read(runner: TransformersRunner) -> Iterator[np.ndarray]:
        ids = [runner.encode(row) for row in rows[:3]]
        return runner.logprobs(ids, [[len(one) - 1] for one in ids])

    with TransformersRunner(tiny_hf, dtype="float32") as one, TransformersRunner(tiny_hf, dtype="float32") as other:
        for _ in zip(read(one), read(other), strict=True):
            assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
