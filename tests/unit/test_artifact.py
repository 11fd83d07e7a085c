"""The card: its commands are what a shell reads as one program and ask what was taught; its speeds say what they are worth."""

from __future__ import annotations

import ast
import json
import shlex
from dataclasses import replace
from typing import Any

from edgedistill.artifact import Manifest, commands, model_card
from tests.unit.made_build import speed_facts
from tests.unit.stages.test_package_draft import manifest

SYSTEM = "Answer with one function call."
SAID = 'don\'t pay "$5" für\nÖl now'


def asking(*messages: tuple[str, Any], **changes: Any) -> Manifest:
    example = [{"role": role, "content": content} for role, content in messages]
    return replace(manifest({}), example=example, **changes)


def words(of: Manifest, program: str) -> list[str]:
    return shlex.split(next(line for line in commands(of) if line.startswith(program)))


def test_llama_cli_is_asked_with_the_system_message_and_ends() -> None:
    found = words(asking(("system", SYSTEM), ("user", SAID)), "llama-cli")
    assert found[-5:] == ["-st", "-sys", SYSTEM, "-p", SAID] and "--no-escape" not in found
    found = words(asking(("user", SAID)), "llama-cli")
    assert found[-3:] == ["-st", "-p", SAID] and "-sys" not in found


def test_what_looks_like_an_escape_stays_what_it_is() -> None:
    found = words(asking(("user", r"split at \n")), "llama-cli")
    assert found[-4:] == ["-st", "--no-escape", "-p", r"split at \n"]


def test_python_is_given_the_whole_example_as_python_writes_it() -> None:
    of = asking(("system", SYSTEM), ("user", SAID), ("assistant", None))
    found = words(of, "python -c")
    assert len(found) == 3
    calls = [one for one in ast.walk(ast.parse(found[2])) if isinstance(one, ast.keyword) and one.arg == "messages"]
    assert [ast.literal_eval(one.value) for one in calls] == [of.example]
    assert "n_ctx=2048" in found[2]


def test_onnx_is_asked_the_same() -> None:
    of = asking(("system", SYSTEM), ("user", SAID), format="onnx")
    found = words(of, "python -c")
    texts = [
        one.args[0].value
        for one in ast.walk(ast.parse(found[2]))
        if isinstance(one, ast.Call)
        and isinstance(one.func, ast.Attribute)
        and one.func.attr == "apply_chat_template"
        and isinstance(one.args[0], ast.Constant)
    ]
    assert [json.loads(str(text)) for text in texts] == [of.example] and "\n" not in found[2]


def card(measurement: dict[str, Any]) -> list[str]:
    text = model_card(replace(manifest({}), measurement=measurement), grammar=False)
    return text[text.index("## Speed and size") : text.index("## Gates")].split("\n")[2:-2]


def test_the_card_says_how_fast_by_what_and_how_sure() -> None:
    assert card(speed_facts(100.0, 9, 3.5)) == [
        "- file: 0.0 MB",
        "- prompt processing (pp512): 700.0 [686.0, 714.0] tokens/s, median of n = 5",
        "- generation (tg128): 100.0 [98.0, 102.0] tokens/s, median of n = 5",
        "- decode against the teacher's f16: 3.50x [3.45, 3.56], n = 5",
        "- time to first token, P50 / P95 / P99: 41 / 56 / 60 ms, n = 16",
        "- a whole request, P50 / P95 / P99: 45 / 60 / 64 ms, n = 16",
        "- peak memory of the process: 310 MiB, with a context of 2048 tokens",
        "- measured on: AMD EPYC <Zen 4> (x86_64), 2 threads; llama-cpp-python 0.3.36, abc: AVX2; "
        "load average 0.1 before, 0.9 after, others kept 0.1 cores busy",
    ]
    assert card({}) == ["- file: 0.0 MB"]


def test_the_card_says_what_was_noisy() -> None:
    facts = speed_facts(100.0, 9, 3.5)
    facts["measurement"] |= {"noise": ["tg varies by 9%"], "load_before": None, "ttft_ms": None, "request_ms": None}
    facts["ratio"]["noise"] = ["tg varies by 9%", "other processes kept 0.7 cores busy"]
    *lines, load, noise = card(facts)
    assert noise == "- **noisy**: do not rely on these speeds: tg varies by 9%; other processes kept 0.7 cores busy"
    assert load.endswith("; load average unknown, others kept 0.1 cores busy")
    assert not any("P50" in line for line in lines)
