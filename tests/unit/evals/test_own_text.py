"""What a model writes itself, to be calibrated on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgedistill.data.prompts import Row
from edgedistill.evals.own_text import ANSWER, USER, own_conversations, read_conversations
from edgedistill.evals.runners.gguf import GgufRunner
from edgedistill.formats.gguf.convert import convert
from tests.unit.formats.gguf.conftest import make_model


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("own") / "tiny")
    convert(folder, folder / "model.gguf", dtype="f16")
    return folder / "model.gguf"


def test_each_is_a_turn_of_the_template(gguf: Path) -> None:
    with GgufRunner(gguf) as runner:
        start, rest = runner.around_user()
        asked = runner.encode(Row(id="1", messages=({"role": "user", "content": "hi"},)))
        assert [*start, *runner.encode_text("hi"), *rest] == asked
        rows, starts = own_conversations(runner, 5)
    assert 0 < len(rows) == len(starts) <= 5
    for row, begun in zip(rows, starts, strict=True):
        assert row[: len(start)] == start and row[begun - len(rest) : begun] == rest
        assert 0 < begun - len(start) - len(rest) <= USER and len(row) - begun <= ANSWER + 1


def test_draws_hang_on_the_seed_alone(gguf: Path) -> None:
    with GgufRunner(gguf) as runner:
        first = own_conversations(runner, 4)
        assert own_conversations(runner, 4) == first
        assert own_conversations(runner, 4, seed=1)[0] != first[0]
    with GgufRunner(
        gguf, parallel=1
    ) as runner:  # other neighbours in the batch: the numbers drawn are those of the places
        alone = own_conversations(runner, 4)[0]
    assert [row[:12] for row in alone] == [row[:12] for row in first[0]]


def with_template(gguf: Path, folder: Path, template: str | None) -> Path:
    shutil.copytree(gguf.parent, folder)
    (folder / "model.gguf").unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    if template is None:
        del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return convert(folder, folder / "model.gguf", dtype="f16").path


def test_a_template_that_begins_with_the_message_has_something_to_go_on_from(gguf: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with GgufRunner(with_template(gguf, tmp_path / "bare", template)) as runner:
        start, rest = runner.around_user()
        assert len(start) == 1 and rest == runner.encode_text("\n")
        rows, _ = own_conversations(runner, 3)
    assert len(rows) == 3


def test_without_a_template_it_is_plain_text(gguf: Path, tmp_path: Path) -> None:
    with GgufRunner(with_template(gguf, tmp_path / "plain", None)) as runner:
        start, rest = runner.around_user()
        assert len(start) == 1 and rest == []
        rows, _ = own_conversations(runner, 3)
    assert all(1 < len(row) <= 2 + USER + ANSWER for row in rows)


def test_none_of_no_step() -> None:
    assert read_conversations(None) == ([], [])
