"""Check the quickstart's grammar: it accepts exactly the calls, by our reading of it and by llama.cpp's."""

from __future__ import annotations

import ctypes
import json
import math
import re
from pathlib import Path

import pytest

from edgedistill.recipes.quickstart import make_data

HERE = Path(make_data.__file__).parent


def references() -> list[str]:
    """Return the call of every row of every split of the task."""
    files = [(HERE / "data" / f"{split}.jsonl").read_text(encoding="utf-8") for split in make_data.SIZES]
    return [json.loads(line)["reference"] for text in files for line in text.splitlines()]


def as_regex(grammar: str) -> re.Pattern[str]:
    """Turn the GBNF into a regular expression: it is not recursive, and uses literals, classes, ( ) | ? + only."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines() if line)

    def expand(name: str) -> str:
        out = ""
        for part in re.findall(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[()|?+]|[\w-]+', rules[name]):
            if part[0] == '"':
                out += "(?:" + re.escape(json.loads(part)) + ")"
            elif part[0] == "[":
                out += part
            else:
                out += part.replace("(", "(?:") if part in "()|?+" else f"(?:{expand(part)})"
        return out

    return re.compile(expand("root"))


WRONG = (
    '{"name": "set_timer","arguments":{"minutes":5}}',
    '{"name":"set_timer","arguments":{"minutes":5}} ',
    '{"name":"set_timer","arguments":{"minutes":05}}',
    '{"name":"set_timer","arguments":{"minutes":0}}',
    '{"name":"set_timer","arguments":{"minutes":"5"}}',
    '{"name":"set_timer","arguments":{"label":"tea","minutes":5}}',
    '{"name":"set_timer","arguments":{}}',
    '{"name":"set_volume","arguments":{"level":101}}',
    '{"name":"set_alarm","arguments":{"time":"7:00"}}',
    '{"name":"set_alarm","arguments":{"time":"24:00"}}',
    '{"name":"set_alarm","arguments":{"time":"07:60"}}',
    '{"name":"toggle_setting","arguments":{"setting":"radio","on":true}}',
    '{"name":"toggle_setting","arguments":{"setting":"wifi","on":"true"}}',
    '{"name":"take_note","arguments":{"text":""}}',
    '{"name":"take_note","arguments":{"text":"a"b"}}',
    '{"name":"take_note","arguments":{"text":"a","day":"today"}}',
    '{"name":"fly","arguments":{}}',
)
RIGHT = (
    '{"name":"set_timer","arguments":{"minutes":999}}',
    '{"name":"set_volume","arguments":{"level":0}}',
    '{"name":"set_volume","arguments":{"level":100,"stream":"media"}}',
    '{"name":"take_note","arguments":{"text":"say \\"hi\\" to Zoë \\\\ ☕\\n\\u001f"}}',
    '{"name":"create_event","arguments":{"title":"x","day":"today"}}',
)


def test_grammar_accepts_exactly_the_calls() -> None:
    pattern = as_regex((HERE / "grammar.gbnf").read_text(encoding="utf-8"))
    for text in references():
        assert pattern.fullmatch(text), text
    for text in RIGHT:
        assert pattern.fullmatch(text), text
        parsed = json.loads(text)
        assert make_data.canonical_call(parsed["name"], parsed["arguments"]) == text
    for text in WRONG:
        assert not pattern.fullmatch(text), text


def test_llama_cpp_parses_the_grammar() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    text = (HERE / "grammar.gbnf").read_text(encoding="utf-8")
    assert llama_cpp.LlamaGrammar.from_string(text, verbose=False) is not None


def test_llama_cpp_samples_every_reference_under_the_grammar(smollm2_gguf: Path) -> None:
    """Walk llama.cpp's own grammar sampler along every reference, token by token, to the end of the turn."""
    llama_cpp = pytest.importorskip("llama_cpp")
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(smollm2_gguf).encode(), parameters)
    assert model
    vocab = llama_cpp.llama_model_get_vocab(model)
    grammar = (HERE / "grammar.gbnf").read_bytes()
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar, b"root")
    assert sampler
    end = llama_cpp.llama_vocab_eos(vocab)

    def encode(text: str) -> list[int]:
        raw = text.encode()
        buffer = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, False)
        assert n >= 0
        return list(buffer[:n])

    def allowed(token: int) -> bool:
        one = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token, 0.0, 0.0))
        array = llama_cpp.llama_token_data_array(one, 1, -1, False)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        return math.isfinite(one[0].logit)

    def accepts(text: str) -> bool:
        llama_cpp.llama_sampler_reset(sampler)
        for token in encode(text):
            if not allowed(token):
                return False
            llama_cpp.llama_sampler_accept(sampler, token)
        return allowed(end)

    try:
        for text in (*RIGHT, *references()):
            assert accepts(text), text
        for text in WRONG:
            assert not accepts(text), text
    finally:
        llama_cpp.llama_sampler_free(sampler)
        llama_cpp.llama_model_free(model)
