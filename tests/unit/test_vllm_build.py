"""A build that starts vLLM for the steps that ask its teacher, and stops it: here a stand-in for it, in tests/e2e/test_teachers.py
the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.errors import RecipeError, StepFailed, UsageError
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.served import Launch
from edgedistill.session import Session, prepare
from edgedistill.store import Store
from edgedistill.teachers import vllm
from tests.unit.taught import WORDS, make_taught

STAND_IN = Path(__file__).parents[1] / "vllm_stand_in.py"
RECIPE = """
schema  = 1
name    = "by-vllm"
targets = ["laptop-x86"]

[teacher]
model       = "path:teacher"
min_score   = { words = 0.0 }
concurrency = 4
vllm        = { context = 512 }

[student]
model = "path:model"

[prompts]
files = ["rows.jsonl"]

[generate]
max_new_tokens = 12

[[filter]]
kind   = "reference"
metric = "exact"

[score]
kind = "top-k"
n    = 30

[distill]
method     = "full"
epochs     = 2
batch_size = 8
loss       = { kd = 1.0, ce = 0.0, temperature = 1.0 }

[suites.words]
files  = ["asked.jsonl"]
metric = "exact"
"""


def launch(**changes: Any) -> Launch:
    known: dict[str, Any] = {"tensor_parallel": 1, "servers": 1, "context": None, "dtype": "auto", "args": ()}
    return Launch(**{**known, "start_timeout": 60.0, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_taught(tmp_path_factory.mktemp("vllm"))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that takes the arguments of a python with vLLM."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv(vllm.PYTHON, str(script))
    monkeypatch.setenv("STAND_IN_PIDS", str(tmp_path / "pids"))
    return script


def pids(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "pids").read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


def prepared(folder: Path, store: Path, **overrides: Any) -> Session:
    return prepare(folder, store=Store(store), overrides=overrides)


def test_each_step_that_asks_starts_a_server_and_stops_it(folder: Path, tmp_path: Path) -> None:
    session = prepared(folder, tmp_path / "store")
    plan = session.plan.only(session.plan.match("score"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    started = pids(tmp_path)
    assert len(started) == 3  # evaluate, generate, score
    assert not any(map(alive, started))
    assert not list((tmp_path / "store" / "logs").iterdir())
    both = 2 * len(WORDS)  # the suite and the prompts
    assert RowStore(tmp_path / "store").counts() == {"rows": both, "asks": both}
    assert Runner(plan, session.store).build().ran == []
    # The teacher's weights are what its answers are kept by: transformers would ask nothing again.
    lines = [line for line in RECIPE.splitlines() if not line.startswith(("vllm", "concurrency"))]
    (folder / "here.toml").write_text("\n".join(lines))
    here = prepare(folder / "here.toml", store=Store(tmp_path / "store"))
    assert here.plan.match("generate")[0].key == session.plan.match("generate")[0].key
    assert here.plan.match("score")[0].key != session.plan.match("score")[0].key


def test_what_is_always_asked_along_and_vllms_own_arguments_are_in_the_keys(folder: Path, tmp_path: Path) -> None:
    plain = prepared(folder, tmp_path / "store").plan
    for change in (
        {"teacher.body": {"chat_template_kwargs": {"x": 1}}},
        {"teacher.vllm.args": ["--quantization", "fp8"]},
        {"teacher.vllm.dtype": "float16"},
    ):
        other = prepared(folder, tmp_path / "store", **change).plan
        for step in ("evaluate/teacher", "generate", "score"):
            assert other.match(step)[0].key != plain.match(step)[0].key, step
    more = prepared(folder, tmp_path / "store", **{"teacher.vllm.servers": 2, "teacher.concurrency": 9}).plan
    assert more.match("score")[0].key == plain.match("score")[0].key


def test_what_was_kept_and_rejected_is_shown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISTILL_STORE", str(tmp_path / "store"))
    command = ["data", "show", str(folder)]
    told = CliRunner().invoke(app, command)
    assert isinstance(told.exception, UsageError) and "--until filter" in told.exception.hint
    # half of the references are not what the teacher says
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    wrong = [{**row, "reference": "?"} if at % 2 else row for at, row in enumerate(rows)]
    (folder / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    lines = [line.replace("rows.jsonl", "wrong.jsonl") for line in RECIPE.splitlines() if not line.startswith("vllm")]
    (folder / "wrong.toml").write_text("\n".join(line for line in lines if not line.startswith("concurrency")))
    session = prepare(folder / "wrong.toml", store=Store(tmp_path / "store"))
    assert not Runner(session.plan.only(session.plan.match("filter")), session.store).build().failed
    command[-1] = str(folder / "wrong.toml")
    kept = CliRunner().invoke(app, [*command, "--json", "-n", "0"])
    assert [json.loads(line)["text"] for line in kept.stdout.splitlines()] == list(WORDS[::2])
    rejected = CliRunner().invoke(app, [*command, "--why", "reference", "--json", "-n", "3"])
    found = [json.loads(line) for line in rejected.stdout.splitlines()]
    assert [(line["text"], line["why"]) for line in found] == [(word, "reference (exact)") for word in WORDS[1:7:2]]
    assert "3 of 6 rows" in rejected.stderr
    assert "6 x reference (exact)" in CliRunner().invoke(app, [*command, "--rejected"]).stdout


@pytest.mark.slow  # five seconds; one server stays
def test_several_servers_share_the_work(folder: Path, tmp_path: Path) -> None:
    servers = vllm.Servers(folder / "teacher", launch(servers=2), logs=tmp_path / "logs", note=lambda text: None)
    try:
        assert len(set(servers.urls)) == 2 == len(pids(tmp_path))
    finally:
        servers.close()
        servers.close()
    assert not any(map(alive, pids(tmp_path)))


def test_what_a_server_said_before_it_died_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="vLLM ended with 7: ValueError: no GPU is that large") as caught:
        vllm.Servers(folder / "teacher", launch(args=("--crash",)), logs=tmp_path / "logs", note=lambda text: None)
    assert str(next((tmp_path / "logs").iterdir())) in caught.value.hint
    with pytest.raises(StepFailed, match="vLLM did not come up"):
        sleepy = launch(args=("--sleep",), start_timeout=1.0)
        vllm.Servers(folder / "teacher", sleepy, logs=tmp_path / "logs", note=lambda text: None)


def test_a_server_dies_with_the_build_that_is_killed(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom edgedistill.teachers import vllm\n"
        "from tests.unit.test_vllm_build import launch\n"
        "vllm.Servers(Path(sys.argv[1]), launch(), logs=Path(sys.argv[2]), note=print)\nprint('up', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(folder / "teacher"), str(tmp_path / "logs")]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment) as build:
        assert build.stdout
        while build.stdout.readline() not in ("up\n", ""):
            pass
        (started,) = pids(tmp_path)
        assert alive(started)
        os.kill(build.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(started)


def test_arguments_and_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm, "has_gpu", lambda: True)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    wide = launch(tensor_parallel=2, servers=2, context=4096, scored=50, args=("--seed", "3"))
    given = vllm.arguments(tmp_path, wide, 8000)
    assert (
        "--tensor-parallel-size 2 --max-logprobs 50 --generation-config vllm --max-model-len 4096 --seed 3"
        in " ".join(given)
    )
    assert [vllm.environment(wide, number)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert vllm.environment(wide, 1)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "PYTHONPATH" not in vllm.environment(wide, 0)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"teacher.backend": "llama_cpp", "teacher.model": "gguf:x.gguf"}, "teacher.vllm"),
        ({"teacher.server": "http://127.0.0.1:1/v1"}, "teacher.server"),
        ({"teacher.batch": {}}, "teacher.batch"),
        ({"teacher.body": {"seed": 1}}, "teacher.body"),
        ({"gates.min_speedup": 3.0}, "gates.min_speedup"),
        ({"distill.loss.temperature": 2.0}, "distill.loss.temperature"),
        ({"teacher.vllm.tensor_parallel": 0}, "teacher.vllm.tensor_parallel"),
    ],
)
def test_what_does_not_go_with_it_is_refused(folder: Path, tmp_path: Path, overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(folder, tmp_path / "store", **overrides)
    assert f" {key}: " in str(caught.value)


def test_rows_with_tools_need_a_parser_of_calls(folder: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "alarm", "parameters": {"type": "object"}}}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    (folder / "tools.jsonl").write_text("".join(json.dumps({**row, "tools": [tool]}) + "\n" for row in rows))
    given = {"prompts.files": ["tools.jsonl"]}
    with pytest.raises(RecipeError, match="vLLM reads no calls unless it is told how") as caught:
        prepared(folder, tmp_path / "store", **given)
    assert caught.value.key == "teacher.vllm.args"
    given["teacher.vllm.args"] = ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    with pytest.raises(RecipeError, match="the chat template does not write tool_calls") as caught:  # of this model
        prepared(folder, tmp_path / "store", **given)
    assert caught.value.key == "prompts.files"


def test_without_vllm_the_plan_says_how_to_get_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(vllm.PYTHON)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(RecipeError, match="vLLM is not installed") as caught:
        prepared(folder, tmp_path / "store")
    assert "doctor --install vllm" in str(caught.value) + caught.value.hint
