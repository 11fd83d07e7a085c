"""A checkpoint without a chat template: refused, or given one that ends its answers in every engine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgedistill.artifact import _modelfile
from edgedistill.chat import read_chat
from edgedistill.chat_template import CHATML, plain_template, write_template
from edgedistill.data.prompts import Row, load_rows
from edgedistill.errors import RecipeError
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf.convert import convert
from edgedistill.formats.gguf.read import read_info
from edgedistill.models import resolve
from edgedistill.runner import Runner
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from edgedistill.training.data import encode_example, turn_end
from tests.unit.formats.gguf.conftest import make_model, make_tokenizer
from tests.unit.tool_template import TEMPLATE, TOOL

RECIPE = """
schema  = 1
name    = "base-student"
targets = ["laptop-x86"]
[teacher]
model = "path:model"
[student]
model = "path:student"
[prompts]
files = ["rows.jsonl"]
[distill]
method = "full"
"""
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & say 'why'."},
    {"role": "user", "content": "wake me\nat seven"},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "naïve 🙂"},
]
ENDS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|fin|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def bare(folder: Path, *, weights: bool = False, eos: str = "<|endoftext|>", extra: str = "", **options: Any) -> Path:
    """Write a model whose tokenizer has no template; without ``weights`` only what a plan reads of it."""
    if weights:
        make_model(folder, **options)
    else:
        vocab = make_tokenizer(folder, **options)
        settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
        settings |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": vocab}
        (folder / "config.json").write_text(
            json.dumps({**settings, "tie_word_embeddings": True, "max_position_embeddings": 256, "eos_token_id": 0})
        )
        (folder / "model.safetensors").write_bytes(b"")
    if extra:  # as if "<|im_start|>" and "<|im_end|>" had never been
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace("<|im_start|>", "<|other|>").replace("<|im_end|>", extra))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"], config["pad_token"], config["bos_token"]
    path.write_text(json.dumps({**config, "eos_token": eos}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a recipe of an instruction-tuned teacher and a base student with the same tokens; nothing has weights."""
    bare(tmp_path / "student")
    bare(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"id": f"r{n}", "messages": CONVERSATION, "reference": "ok"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def session(folder: Path, **overrides: Any) -> Session:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return prepare(folder, store=Store(folder / "store"), overrides=changes)


def refused(folder: Path, key: str, **overrides: Any) -> RecipeError:
    with pytest.raises(RecipeError) as error:
        session(folder, **overrides)
    assert error.value.key == key, str(error.value)
    return error.value


def given(folder: Path, text: str, **overrides: Any) -> dict[str, Any]:
    (folder / "own.jinja").write_text(text)
    return {"student__chat_template": "own.jinja", "score__kind": "dense", **overrides}


def test_a_student_without_a_template_is_refused_with_the_key_to_write(folder: Path) -> None:
    error = refused(folder, "student.chat_template")
    assert "path:student has no chat template" in error.message
    assert error.hint.startswith('set student.chat_template = "teacher"')
    bare(folder / "student", extra="<|fin|>")
    assert 'chat_template = "plain"' in refused(folder, "student.chat_template").hint
    (folder / "model" / "chat_template.jinja").unlink()
    error = refused(folder, "teacher.chat_template", student__model="teacher")
    assert 'set teacher.chat_template = "chatml"' in error.hint
    error = refused(folder, "student.chat_template", student__model="teacher", student__chat_template="plain")
    assert "set teacher.chat_template" in error.message
    assert (
        'this is the teacher: write "chatml"'
        in refused(folder, "teacher.chat_template", teacher__chat_template="teacher").message
    )


def test_what_was_known_of_a_model_before_templates_were_looked_for_is_read_again(folder: Path) -> None:
    model = resolve("path:student", folder / "store", base=folder)
    (memo,) = (folder / "store" / "models" / "facts").iterdir()
    facts = json.loads(memo.read_text())
    del facts["template"]
    memo.write_text(json.dumps(facts))
    assert resolve("path:student", folder / "store", base=folder).facts == model.facts
    assert model.facts.template is False and resolve("path:model", folder / "store", base=folder).facts.template


def test_only_the_students_steps_hear_of_its_template(folder: Path) -> None:
    def keys(**overrides: Any) -> dict[str, str]:
        return {name: step.key for step in session(folder, **overrides).plan.steps for name in step.ids}

    teacher, same = (keys(student__chat_template=name) for name in ("teacher", "model/chat_template.jinja"))
    assert teacher == same  # what it says counts, not where it stands
    plain = keys(student__chat_template="plain", score__kind="dense")
    chatml = keys(student__chat_template="chatml", score__kind="dense")
    changed = {name for name in plain if plain[name] != chatml[name]}
    assert {"base/student", "distill/1", "convert/student"} <= changed
    assert not {name for name in changed if "teacher" in name or name in ("generate", "filter")}
    (folder / "student" / "chat_template.jinja").write_text(TEMPLATE)
    base = next(step.stage for step in session(folder).plan.steps if "base/student" in step.ids)
    assert not {"chat_template", "end_of_turn"} & base.fields().keys()


def test_a_template_in_the_place_of_the_models_own_gets_a_word(folder: Path) -> None:
    (folder / "student" / "chat_template.jinja").write_text(TEMPLATE)
    told = session(folder, student__chat_template="plain", score__kind="dense").plan.warnings
    assert any('chat template of its own: student.chat_template = "plain" replaces it' in line for line in told)
    told = session(folder, student__chat_template="teacher").plan.warnings
    assert not any("chat template" in line for line in told)


def test_a_first_token_that_the_template_leaves_out_gets_a_word(folder: Path) -> None:
    bare(folder / "student", bos=True)
    told = session(folder, **given(folder, CHATML)).plan.warnings
    assert any("begins texts with <|im_start|>" in line for line in told) is False  # ChatML begins so
    told = session(folder, **given(folder, "> " + CHATML)).plan.warnings
    assert any("begins texts with <|im_start|>, and own.jinja does not print it" in line for line in told)
    plan = session(folder, student__chat_template="plain", score__kind="dense").plan
    base = next(step.stage for step in plan.steps if "base/student" in step.ids)
    assert base.fields()["chat_template"] == plain_template("<|endoftext|>", "<|im_start|>")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("{% for m in messages %}{{ m.content }", "unexpected", ""),
        ("{{ messages[0].content + 1 }}", "refuses the conversation", ""),
        (CHATML.replace("message['content']", "''"), "does not print what the assistant says", "message['content']"),
        (CHATML.partition("{% if add")[0], "does not say where an answer begins", "add_generation_prompt"),
        (CHATML.replace("im_end", "eot"), r"ends an answer with '<|eot|>\n'", "eos_token"),
        (CHATML.replace("<|im_end|>", ""), "generation would not end", "eos_token"),
        ("{{ eos_token }}" + CHATML, "prints eos_token elsewhere", "write that token out"),
        (CHATML.replace("message['role'] +", "('s' if message['role'] == 'system' else message['role']) +"), None, ""),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML, "row 'r0' of prompts", ""),
        (
            CHATML.replace("{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'").replace(
                "{% endfor", "{% endif %}{% endfor"
            ),
            "leaves out what the system says",
            "of every message",
        ),
        (CHATML.replace("message['content'] or", "message['content'][:4] or"), "does not print what", ""),
        (CHATML.replace("message['content'] or", "message['content'][:8] or"), "leaves out what the system says", ""),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_learnt_from_is_refused_with_its_name(
    text: str, message: str | None, hint: str, folder: Path
) -> None:
    overrides = given(folder, text)
    if message is None:
        assert session(folder, **overrides).plan.packages
        return
    error = refused(folder, "student.chat_template", **overrides)
    assert message in error.message and hint in error.hint and "own.jinja: " in error.message


def test_a_template_that_is_not_there_or_not_of_these_tokens_is_refused(folder: Path) -> None:
    error = refused(folder, "student.chat_template", student__chat_template="none.jinja")
    assert "none.jinja: No such file" in error.message and '"plain"' in error.hint
    (folder / "odd.jinja").write_bytes(b"\xff\xfe")
    assert "no UTF-8" in refused(folder, "student.chat_template", student__chat_template="odd.jinja").message
    bare(folder / "student", extra="<|fin|>")
    error = refused(folder, "student.chat_template", student__chat_template="chatml")
    assert "no special token <|im_start|>" in error.message and '"plain"' in error.hint
    assert (
        "generation would not end" in refused(folder, "student.chat_template", student__chat_template="teacher").message
    )
    bare(folder / "student", eos="")
    assert "names no EOS" in refused(folder, "student.chat_template", student__chat_template="plain").message


def test_tools_that_a_given_template_does_not_print_are_refused(folder: Path) -> None:
    row = {"id": "t", "prompt": "will it rain?", "tools": [TOOL], "reference": "ok"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    error = refused(folder, "prompts.files", student__chat_template="chatml", score__kind="dense")
    assert "path:student (chat_template = 'chatml') does not print them" in error.message
    assert session(folder, student__chat_template="teacher").plan.packages


def test_distributions_after_another_prompt_are_refused(folder: Path) -> None:
    error = refused(folder, "student.chat_template", student__chat_template="plain")
    assert "row 'r0': path:model and path:student have chat templates that print it differently" in error.message
    assert 'set student.chat_template = "teacher"' in error.hint
    for changes in ({"score.kind": "none", "distill.loss.kd": 0}, {"score.kind": "dense"}):
        assert session(folder, student__chat_template="plain", **changes).plan.packages
    # The same words from two templates are the same prompt.
    assert session(folder, student__chat_template="chatml").plan.packages


def test_a_gguf_is_given_one_too(smollm2_gguf: Path, folder: Path) -> None:
    source = f"gguf:{smollm2_gguf}"
    found = session(
        folder, student__model=source, student__chat_template="plain", score__kind="dense", teacher__model=source
    )
    assert found.inputs.student.template is not None and found.inputs.student.template.end == "<|im_end|>"
    assert found.inputs.teacher.template is None
    assert any('student.chat_template = "plain" replaces it' in line for line in found.plan.warnings)


def ollama(template: str, messages: list[dict[str, Any]]) -> str:
    """Do what Go's text/template does with the little of it that a Modelfile of ours has."""
    body, tail = template.removeprefix("{{- range .Messages }}").split("{{ end }}{{ end }}")
    branches = re.findall(r'\{\{ (?:else )?(?:if eq \.Role "(\w+)" |)\}\}(.*?)(?=\{\{ else|\Z)', body, re.DOTALL)
    texts = dict(branches)
    found = (texts.get(one["role"], texts[""]).replace("{{ .Content }}", one["content"]) for one in messages)
    return "".join(found) + tail


@pytest.mark.parametrize("name", ["chatml", "plain", "own.jinja"])
def test_every_engine_prints_it_alike_and_ends_there(name: str, tmp_path: Path) -> None:
    """The last of them ends with a token that is on no engine's list."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    from transformers import AutoTokenizer

    extra = "<|fin|>" if name == "own.jinja" else ""
    source = bare(tmp_path / "student", weights=True, extra=extra)
    (tmp_path / "own.jinja").write_text(ENDS)
    (tmp_path / "model").symlink_to(source)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "r", "messages": CONVERSATION, "reference": "ok"}))
    found = session(tmp_path, student__chat_template=name, teacher__chat_template=name, score__kind="dense")
    given = found.inputs.student
    assert found.inputs.teacher.template == given.template and given.template is not None
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    assert not Runner(found.plan.only(found.plan.match("base/student")), found.store).build().failed
    entry = found.store.load(found.plan.match("base/student")[0].key)
    assert entry is not None and {file.name: file.read_bytes() for file in source.iterdir()} == before
    made = entry.path / "model"
    assert os.path.samefile(made / "model.safetensors", source / "model.safetensors")

    theirs: Any = AutoTokenizer.from_pretrained(made)
    end = given.template.end
    assert end == {"chatml": "<|im_end|>", "plain": "<|endoftext|>", "own.jinja": "<|fin|>"}[name]
    assert turn_end(theirs) == theirs.convert_tokens_to_ids(end) == theirs.eos_token_id
    file = convert(made, tmp_path / "model.gguf").path
    info, row = read_info(file), Row(id="r", messages=tuple(CONVERSATION))
    formatter = Jinja2ChatFormatter(info.chat_template, eos_token=end, bos_token="")
    turns = CONVERSATION[:3]
    with GgufRunner(file) as runner:
        for generation in (True, False):
            text = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=generation, tokenize=False)
            assert read_chat(given).render(CONVERSATION, generation=generation) == text
            assert runner._render(CONVERSATION, generation_prompt=generation) == text
        assert formatter(messages=cast(Any, CONVERSATION)).prompt == runner._render(CONVERSATION)
        assert runner.encode(row) == theirs.encode(runner._render(CONVERSATION), add_special_tokens=False)
        assert runner.end_token() == theirs.eos_token_id and runner._lib.llama_vocab_is_eog(
            runner._vocab, theirs.eos_token_id
        )
        if name == "plain":
            modelfile = _modelfile(file, SimpleNamespace(generation={"context": 512}, example=[]))  # type: ignore[arg-type]
            assert ollama(modelfile.split('"""')[1], CONVERSATION) == runner._render(CONVERSATION)
            assert f'PARAMETER stop "{end}"' in modelfile
        # What is learnt of a turn is what the next turn shows of it.
        one = encode_example(theirs, turns[:2], "done")
        shown = theirs.apply_chat_template(turns, tokenize=False)
        learnt = theirs.decode([*one.prompt_ids, *one.completion_ids])
        assert shown.startswith(learnt) and learnt.endswith("done" + end)
    assert info.metadata["tokenizer.ggml.eos_token_id"] == theirs.eos_token_id


def test_what_ended_a_text_before_still_does_in_transformers(tmp_path: Path) -> None:
    folder = bare(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "top_k": 5}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    write_template(folder, CHATML, "<|im_end|>")

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text())

    assert read("generation_config.json") == {"eos_token_id": [2, 0], "top_k": 5}
    assert read("config.json")["eos_token_id"] == 2 and read("special_tokens_map.json")["eos_token"] == "<|im_end|>"
    assert read("tokenizer_config.json")["eos_token"] == "<|im_end|>"


@pytest.mark.slow
def test_a_base_model_learns_to_answer_and_to_end(tmp_path: Path) -> None:
    """From a checkpoint without a template to a file in llama.cpp: the ordinary steps, and the answers stop."""
    bare(tmp_path / "model", weights=True, extra="<|fin|>")
    rows = [{"id": word, "prompt": f"Say {word}.", "reference": word} for word in ("alarm", "call", "volume", "queue")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapt = '[adapt]\nfiles = ["rows.jsonl"]\nmethod = "full"\nepochs = 40\nbatch_size = 4\nlr = 3e-3\n'
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("path:student", "teacher") + adapt)
    found = session(tmp_path, teacher__chat_template="plain")
    assert not Runner(found.plan.only(found.plan.match("convert/teacher")), found.store).build().failed
    entry = found.store.load(found.plan.match("convert/teacher")[0].key)
    assert entry is not None
    with GgufRunner(entry.path / "model.gguf") as runner:
        answers = runner.answer(load_rows(tmp_path / "rows.jsonl"), max_new_tokens=12)
    assert [(one.text, one.finish) for one in answers] == [(row["reference"], "stop") for row in rows]


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("plain", "<|endoftext|>")])
def test_onnx_prints_what_is_built_in_as_transformers_does(name: str, end: str, tmp_path: Path) -> None:
    from edgedistill.formats.onnx.build import build
    from edgedistill.formats.onnx.check import compare

    shape: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}
    folder, out = bare(tmp_path / "model", weights=True, pre="gpt-2", **shape), tmp_path / "onnx"
    write_template(folder, CHATML if name == "chatml" else plain_template(end, "<|im_start|>"), end)
    build(folder, out, "fp32")
    assert compare(folder, out, [CONVERSATION, CONVERSATION[:2]]).greedy_equal == 2
    number = json.loads((folder / "config.json").read_text())["eos_token_id"]
    ends = json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"]
    assert number in (ends if isinstance(ends, list) else [ends])
