"""One temperature: fitted as a plain search finds it, folded exactly, and left out where it does not help."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.data.prompts import Row
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.calibration import BINS
from edgedistill.fingerprint import Key
from edgedistill.stages.temper import Temper
from edgedistill.training.data import Example
from edgedistill.training.temperature import (
    BOUNDS,
    _states,
    check_folded,
    fit,
    fit_scale,
    fold,
    measure,
)
from tests.unit.formats.gguf.conftest import TEXT, make_model
from tests.unit.training.tiny import VOCAB, make_examples, make_llama


def quiet(done: int, total: int, note: str) -> None:
    """Say nothing."""


def plain_logits(model: Any, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return logits and labels at every completion token by the model's own forward, row by row, in float64."""
    logits, labels, rows = [], [], []
    with torch.no_grad():
        for at, one in enumerate(examples):
            out = model(input_ids=torch.tensor([[*one.prompt_ids, *one.completion_ids]])).logits[0].double()
            logits.append(out[len(one.prompt_ids) - 1 : -1])
            labels += one.completion_ids
            rows += [at] * len(one.completion_ids)
    return torch.cat(logits), torch.tensor(labels), rows


def nll(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))


def drawn(model: Any, examples: list[Example], temperature: float) -> list[Example]:
    """Let the model itself draw each completion at a temperature: then that is the one to find."""
    torch.manual_seed(0)
    found = []
    with torch.no_grad():
        for one in examples:
            ids = list(one.prompt_ids)
            for _ in range(8):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature
                ids.append(int(torch.multinomial(torch.softmax(logits, -1), 1)))
            found.append(
                Example(id=one.id, prompt_ids=one.prompt_ids, completion_ids=tuple(ids[len(one.prompt_ids) :]))
            )
    return found


def test_states_labels_and_rows_are_those_of_a_plain_forward() -> None:
    model, examples = make_llama(2), make_examples(20)
    states, labels, rows = _states(model, examples, quiet)
    logits, wanted, owners = plain_logits(model, examples)
    assert labels.tolist() == wanted.tolist()
    assert rows.tolist() == owners
    assert torch.allclose((states @ model.lm_head.weight.T).double(), logits, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.2])
def test_the_temperature_that_text_was_drawn_at_is_found(temperature: float) -> None:
    model = make_llama(2)
    examples = drawn(model, make_examples(160), temperature)
    fitted = fit(model, examples, vocab_size=VOCAB)
    logits, labels, _ = plain_logits(model, examples[0::2])
    p = torch.softmax(logits / temperature, -1)  # Fisher's information on 1 / T: the logits' variance under the model
    information = float(((p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2).sum())
    assert abs(1 / fitted.temperature - 1 / temperature) < 3 * information**-0.5 < 0.2
    grid = np.exp(np.linspace(-1, 1, 2001))
    best = grid[int(np.argmin([nll(logits, labels, one) for one in grid]))]
    assert fitted.temperature == pytest.approx(best, rel=2e-3)
    if temperature != 1.0:
        assert fitted.helped
        assert fitted.after.error.value < fitted.before.error.value
    assert (fitted.fitted_rows, fitted.before.nll.n) == (80, 80)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 20.0))
def test_no_temperature_within_the_bounds_is_better(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, states = (torch.randn(shape, generator=generator) for shape in ((17, 5), (40, 5)))
    weight *= spread
    labels = torch.randint(0, 17, (40,), generator=generator)
    scale = fit_scale(weight, states, labels)
    assert 1 / BOUNDS[1] <= scale <= 1 / BOUNDS[0]
    logits = states @ weight.T
    found = nll(logits, labels, 1 / scale)
    for temperature in np.linspace(*BOUNDS, 60):
        assert found <= nll(logits, labels, float(temperature)) + 1e-4


def test_calibration_is_what_the_definition_says() -> None:
    torch.manual_seed(0)
    weight, states, labels = torch.randn(11, 6), torch.randn(300, 6), torch.randint(0, 11, (300,))
    rows = torch.arange(300) // 10
    found = measure(weight, states, labels, rows, scale=1.7)
    p = torch.softmax(1.7 * (states @ weight.T).double(), -1)
    top, token = p.max(-1)
    right = (token == labels).double()
    ece = 0.0
    for number in range(BINS):
        inside = (top > number / BINS) & (top <= (number + 1) / BINS)
        if inside.any():
            ece += float(inside.double().mean() * (right[inside].mean() - top[inside].mean()).abs())
    assert found.error.value == pytest.approx(ece, abs=1e-6)
    assert found.nll.value == pytest.approx(nll(1.7 * (states @ weight.T), labels, 1.0), rel=1e-5)
    assert (found.tokens, found.nll.n, found.error.n) == (300, 30, 30)
    assert found.gap.value == pytest.approx(float((top - right).mean()), abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_temperature_is_folded_exactly_and_greedy_answers_stay(tied: bool) -> None:
    model, examples = make_llama(2, tied=tied), make_examples(4)
    before, *_ = plain_logits(model, examples)
    fold(model, 1.7)
    after, *_ = plain_logits(model, examples)
    assert check_folded(before, after, 1.7) < 1e-5
    assert (before.argmax(-1) == after.argmax(-1)).all()
    with pytest.raises(StepFailed, match="moved logits by"):
        check_folded(before, after, 1.6)


def test_gemmas_norm_counts_from_one() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Gemma3ForCausalLM(config).eval()
    before, *_ = plain_logits(model, make_examples(3))
    fold(model, 0.7)
    after, *_ = plain_logits(model, make_examples(3))
    assert check_folded(before, after, 0.7) < 1e-4


def test_a_model_without_such_a_norm_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64))
    with pytest.raises(UsageError, match="cannot be folded into a model of type 'gpt2'"):
        fold(model, 1.5)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="19 rows are too few"):
        fit(make_llama(1), make_examples(19), vocab_size=VOCAB)


def test_the_step_writes_a_student_that_says_the_same_less_surely(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "model")
    rows = tuple(
        Row(id=f"r{at}", messages=({"role": "user", "content": f"{at}"},), reference=TEXT[at % len(TEXT)][:40])
        for at in range(24)
    )
    ctx: Any = SimpleNamespace(out=tmp_path / "out", path=lambda key, name: tmp_path / name, progress=quiet)
    ctx.out.mkdir()
    facts = Temper(student=Key("a" * 64), rows_digest="", rows=rows).run(ctx)["temper"]
    assert json.loads(json.dumps(facts)) == facts
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "out" / "model"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = old(ids).logits / (facts["temperature"] if facts["helped"] else 1.0)
        assert torch.allclose(new(ids).logits, expected, atol=1e-4 * float(expected.std()))
    assert {path.name for path in (tmp_path / "out" / "model").glob("tokenizer*")} == {
        path.name for path in source.glob("tokenizer*")
    }
