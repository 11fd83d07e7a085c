"""What the README says is true: its commands run, its recipe is the packaged one, its files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from edgedistill.cli import app
from edgedistill.recipe import load_recipe
from tests.unit.formats.gguf.conftest import make_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def blocks(marker: str, language: str = "sh") -> list[str]:
    """Return the fenced blocks under an invisible ``<!-- marker -->``."""
    return re.findall(rf"^<!-- {marker} -->\n```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def lines_of(found: list[str]) -> list[str]:
    """Return the lines of shell blocks without comments."""
    lines = [re.sub(r"\s+# .*", "", line) for block in found for line in block.splitlines()]
    return [line for line in lines if line.strip()]


def commands(marker: str) -> list[str]:
    """Return the lines of the shell blocks under a marker."""
    return lines_of(blocks(marker))


def shown() -> list[str]:
    """Return every command that the README shows: the lines of all shell blocks, and what stands between backticks in its text."""
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return lines_of(re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)) + [
        " ".join(found.split()) for found in re.findall(r"`((?:edgedistill|pip|scripts/\w+) [^`]+)`", text)
    ]


def parse(line: str) -> None:
    """Have the program's own parser read the words behind `edgedistill`, and run nothing.

    Raises a usage error where a verb, an argument or an option is not known or lacks its value.
    """
    words = shlex.split(line)
    words = words[words.index("edgedistill") + 1 :]
    words = words[: words.index(">")] if ">" in words else words
    program: Any = typer.main.get_command(app)
    parts = [program]
    for part in parts:
        part.callback = lambda **_: None
        parts += getattr(part, "commands", {}).values()
    program.main(args=words, prog_name="edgedistill", standalone_mode=False)


Shell = Callable[[str], subprocess.CompletedProcess[str]]


def shell_in(folder: Path, store: Path, model: Path, gguf: Path) -> Shell:
    """Return a function that runs one line in a folder which has what the README assumes: a model, its GGUF, and rows."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "edgedistill"  # the checkout's, also where the package is not installed
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m edgedistill "$@"\n')
    program.chmod(0o755)
    (folder / "my-model").symlink_to(model)
    (folder / "model.gguf").symlink_to(gguf)
    rows = (ROOT / "edgedistill" / "recipes" / "quickstart" / "data" / "train.jsonl").read_text().splitlines()[:24]
    (folder / "my-rows.jsonl").write_text("\n".join(rows) + "\n")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "EDGEDISTILL_STORE": str(store)}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, text=True, capture_output=True, check=False
        )

    return run


@pytest.fixture(scope="module")
def shell(
    tmp_path_factory: pytest.TempPathFactory, seed_models: Callable[[Path], Path], smollm2: Path, smollm2_gguf: Path
) -> Shell:
    """Run a line where `my-model` is SmolLM2-135M-Instruct."""
    folder = tmp_path_factory.mktemp("readme")
    return shell_in(folder, seed_models(folder / "store"), smollm2, smollm2_gguf)


@pytest.fixture(scope="module")
def tiny_shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Run a line where `my-model` is a tiny random one."""
    from edgedistill.formats.gguf.convert import convert

    folder = tmp_path_factory.mktemp("readme-tiny")
    model = make_model(folder / "tiny", max_position_embeddings=2048)
    convert(model, folder / "tiny.gguf")
    return shell_in(folder, folder / "store", model, folder / "tiny.gguf")


QUICK = (
    "edgedistill report my-recipe",
    "edgedistill init draft",
    "edgedistill schema recipe",
    "edgedistill store verify",
)
"""What the README's text names that runs at once, also where nothing was built."""


def test_there_are_commands_to_run() -> None:
    assert len(commands("run")) >= 8
    assert len(commands("run slow")) == 4
    assert len(shown()) >= 40
    assert set(QUICK) <= set(shown())


def test_quick_commands_run_in_their_order(shell: Shell) -> None:
    for line in [*commands("run"), *QUICK]:
        done = shell(line)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


def test_slow_commands_run_with_a_tiny_model(tiny_shell: Shell) -> None:
    for line in commands("run slow"):
        done = tiny_shell(line)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("run slow"))
def test_slow_commands_run(line: str, shell: Shell) -> None:
    done = shell(line)
    assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("line", dict.fromkeys(shown()))
def test_every_command_shown_is_one(line: str) -> None:
    program = line.split()[0]
    if program == "edgedistill":
        parse(line)
    elif program == "docker":
        if " run " in line:
            parse(line)
        arguments = {found.split()[0] for found in re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)}
        assert set(re.findall(r"--build-arg (\w+)=", line)) <= arguments
    elif program == "pip":
        extras = set(re.findall(r"\[(\w+)\]", line))
        assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    else:
        assert os.access(ROOT / program, os.X_OK), program


@pytest.mark.parametrize(
    "line",
    [
        "edgedistill distil my-recipe",
        "edgedistill targets",
        "edgedistill targets find",
        "edgedistill quantize my-model --type Q4_0",
        "edgedistill quantize my-model -t",
        "edgedistill build my-recipe --threads many",
        "edgedistill merge my-model",
    ],
)
def test_a_command_that_is_none_is_found(line: str) -> None:
    with pytest.raises(Exception) as caught:
        parse(line)
    assert getattr(caught.value, "exit_code", None) == 2


def test_recipe_shown_is_the_packaged_one(tmp_path: Path) -> None:
    """The comments are the README's own; keys and values are the recipe's, to the last one."""
    (shown,) = blocks("recipe", "toml")
    packaged = ROOT / "edgedistill" / "recipes" / "quickstart" / "recipe.toml"
    assert tomllib.loads(shown) == tomllib.loads(packaged.read_text())
    (tmp_path / "recipe.toml").write_text(shown)
    assert load_recipe(tmp_path / "recipe.toml").name == "quickstart"


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_numbers_are_filled_in() -> None:
    assert "@@" not in README


def test_the_quickstart_says_what_the_readme_says_of_its_time() -> None:
    script = (ROOT / "scripts" / "quickstart").read_text()
    for time in ("2 to 10 minutes", "half an hour to 40 minutes"):
        assert time in README and time in script


def test_exit_codes_are_those_of_the_errors() -> None:
    from edgedistill import errors

    line = re.search(r"^Exit codes: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    assert line
    codes = {int(code) for code in re.findall(r"(?:^|; )(\d+) ", line[1].replace("\n", " "))}
    known = {
        error.exit_code for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "exit_code")
    }
    assert codes == known | {0, 130}
