"""The command line before it does anything: it starts fast, explains itself, and refuses bad input in one message."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from edgedistill import __version__
from edgedistill.cli import app
from tests.conftest import unreadable

HEAVY = ("torch", "numpy", "llama_cpp", "transformers", "peft", "pyarrow", "onnxruntime", "onnxruntime_genai", "gguf")
HELP_SECONDS = 0.3  # what we promise on a quiet machine
NOISE = 2.0  # a machine that runs other things beside the tests may take so many times as long


def edgedistill(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgedistill", *map(str, arguments)],
        text=True,
        capture_output=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def verbs() -> Iterator[tuple[str, ...]]:
    """Yield every verb as its words, groups included."""

    def walk(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*words, name))

    return walk(typer.main.get_command(app), ())


def commands() -> dict[tuple[str, ...], object]:
    found = {}
    for words in verbs():
        command: object = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]  # type: ignore[attr-defined]
        found[words] = command
    return found


COMMANDS = commands()


def test_help_starts_fast() -> None:
    edgedistill("--help")  # writes the .pyc files
    times = []
    for _ in range(7):
        started = time.perf_counter()
        assert edgedistill("--help").returncode == 0
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < HELP_SECONDS * NOISE, times


def test_importing_the_cli_imports_nothing_heavy() -> None:
    code = f"import sys, edgedistill.cli; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == ""


def test_version() -> None:
    assert edgedistill("--version").stdout == f"edgedistill {__version__}\n"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "edgedistill")
def test_every_verb_and_every_option_has_help(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    text = getattr(command, "help", "") or ""
    assert len(text) > 10, "no help text"
    for parameter in command.params:  # type: ignore[attr-defined]
        if parameter.param_type_name == "option":
            assert parameter.help, f"{parameter.opts} has no help text"


def test_help_goes_to_stdout_and_names_every_verb() -> None:
    done = edgedistill("--help")
    assert done.stderr == ""
    for words in COMMANDS:
        if words:
            assert words[0] in done.stdout


RECIPE = """\
schema  = 1
name    = "tiny"
targets = ["laptop-x86"]

[teacher]
model = "path:model"

[student]
model = "path:model"

[prompts]
files = ["prompts.jsonl"]

[distill]
lr = 1e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Assert one message with the words in it, a next command, exit code 2, nothing on stdout and no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    refused(edgedistill("plan", "nowhere", cwd=tmp_path), "nowhere", "edgedistill init")


def test_packaged_recipe_that_does_not_exist(tmp_path: Path) -> None:
    refused(edgedistill("init", "quikstart", cwd=tmp_path), "quikstart", "quickstart")


def test_init_never_writes_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "mine.txt").write_text("mine")
    refused(edgedistill("init", cwd=tmp_path), "quickstart")
    assert [path.name for path in (tmp_path / "quickstart").iterdir()] == ["mine.txt"]


def test_misspelt_key_names_its_line_and_what_was_meant(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("lr = 1e-4", "learning_rat = 1e-4\nepoch = 2"))
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if text.startswith("epoch "))
    refused(edgedistill("plan", recipe), f"{recipe}:{line}", "distill.epoch", "did you mean", "epochs")


def test_wrong_type_names_its_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("1e-4", '"fast"'))
    refused(edgedistill("plan", recipe), f"{recipe}:15", "distill.lr", "fast")


def test_toml_that_does_not_parse_names_its_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("[student]", "[student"))
    refused(edgedistill("build", recipe), f"{recipe}:8")


def test_a_sweep_over_nothing_over_one_key_twice_and_over_a_key_that_is_none(recipe: Path) -> None:
    refused(edgedistill("sweep", recipe), "nothing to sweep over", "--over distill.lora.rank=8,16,32")
    refused(edgedistill("sweep", recipe, "--over", "distill.lr=1,2", "--over", "distill.lr=3"), "given twice")
    refused(edgedistill("sweep", recipe, "--over", "distill.lrr=1,2"), "distill.lrr = 1", "lr")


def test_unknown_target_in_the_recipe(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("laptop-x86", "laptop-x68"))
    refused(edgedistill("plan", recipe), str(recipe), "laptop-x68", "laptop-x86")


def test_unknown_target_on_the_command_line(recipe: Path) -> None:
    refused(edgedistill("plan", recipe, "-t", "toaster"), "toaster", "laptop-x86")


def test_override_of_an_unknown_key(recipe: Path) -> None:
    refused(edgedistill("plan", recipe, "--set", "distill.lrr=1"), "distill.lrr", "lr")


def test_target_that_does_not_exist(tmp_path: Path) -> None:
    refused(edgedistill("targets", "show", "toaster", cwd=tmp_path), "toaster", "edgedistill targets list")


def test_schema_of_something_else() -> None:
    refused(edgedistill("schema", "toaster"), "toaster", "edgedistill schema recipe")


def test_unknown_verb_and_option_exit_2() -> None:
    refused(edgedistill("biuld"), "biuld")
    refused(edgedistill("build", "--untill", "x"), "--untill")


def test_targets_of_the_folder_are_listed_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "board.toml").write_text(edgedistill("targets", "show", "laptop-x86", cwd=tmp_path).stdout)
    (tmp_path / "targets" / "other.toml").write_text("[build-system]\n")
    done = edgedistill("targets", "list", "--json", cwd=tmp_path)
    assert done.returncode == 0 and {"board", "laptop-x86"} <= {one["name"] for one in json.loads(done.stdout)}
    assert "left out: targets/other.toml" in done.stderr


def test_folder_without_a_model(recipe: Path) -> None:
    refused(edgedistill("plan", recipe), f"{recipe}:6: teacher.model", "path:", "no such file or folder")
    (recipe.parent / "model").mkdir()
    refused(edgedistill("plan", recipe), f"{recipe}:6: teacher.model", "no config.json in this folder")


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for command in (("init", "answer", "file/x"), ("targets", "kernels", "-o", "."), ("init", "answer", "file")):
        done = edgedistill(*command, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "this is a bug" not in done.stderr
        assert command[-1] in done.stderr and "try: " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.unreadable
def test_a_file_that_may_not_be_read_is_no_bug(tmp_path: Path) -> None:
    path = unreadable(tmp_path / "model.gguf")
    refused(edgedistill("quantize", path, "--types", "Q8_0"), f"{path}: Permission denied", f"ls -l {path}")
    path.rename(tmp_path / "config.json")
    refused(edgedistill("quantize", tmp_path, "--types", "Q8_0"), "safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(edgedistill("quantize", tmp_path, "--types", "Q8_0"), "config.json: Permission denied")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("lr = 1e-4", "lr = inf"), "distill.lr: expected a finite number; found inf"),
        (('["prompts.jsonl"]', "[]"), "prompts.files: entries needed: at least 1; found 0"),
        (('["prompts.jsonl"]', "[1]"), "prompts.files[0]: expected a string; found 1"),
        (('"tiny"', '"Tiny"'), 'name: has characters that it may not; found "Tiny"'),
    ],
)
def test_a_value_that_cannot_be_is_told_in_words(change: tuple[str, str], told: str, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace(*change))
    done = edgedistill("plan", recipe)
    refused(done, told)
    assert "validation" not in done.stderr and "pydantic" not in done.stderr


def test_a_traceback_is_shown_only_when_it_is_asked_for(tmp_path: Path) -> None:
    done = edgedistill("-v", "plan", tmp_path / "nope")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "no recipe there" in done.stderr
