"""What the README says is true: its commands run, its recipe is the packaged one, its files exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.cli import app
from edgedistill.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(marker: str, language: str = "sh") -> list[str]:
    """Return the fenced blocks under an invisible ``<!-- marker -->``."""
    return re.findall(rf"^<!-- {marker} -->\n```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(marker: str) -> list[str]:
    """Return the lines of those blocks without comments."""
    lines = [re.sub(r"\s+# .*", "", line) for block in blocks(marker) for line in block.splitlines()]
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def shell(
    tmp_path_factory: pytest.TempPathFactory, seed_models: Callable[[Path], Path], smollm2: Path, smollm2_gguf: Path
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Return a function that runs one line in a folder which has what the README assumes: my-model and model.gguf."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "bin").mkdir()
    program = folder / "bin" / "edgedistill"  # the checkout's, also where the package is not installed
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m edgedistill "$@"\n')
    program.chmod(0o755)
    (folder / "my-model").symlink_to(smollm2)
    (folder / "model.gguf").symlink_to(smollm2_gguf)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "EDGEDISTILL_STORE": str(seed_models(folder / "store")),
    }

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, text=True, capture_output=True, check=False
        )

    return run


def test_there_are_commands_to_run() -> None:
    assert len(commands("run")) >= 8
    assert len(commands("run slow")) == 2


def test_quick_commands_run_in_their_order(shell: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    for line in commands("run"):
        done = shell(line)
        assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("run slow"))
def test_slow_commands_run(line: str, shell: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    done = shell(line)
    assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"


def test_every_verb_named_exists() -> None:
    import typer

    group = typer.main.get_command(app)
    named = set(re.findall(r"(?:^|`)edgedistill ([a-z]+)(?: ([a-z]+))?", README, re.MULTILINE))
    assert len(named) >= 10
    for verb, sub in named:
        command = group.commands.get(verb)  # type: ignore[attr-defined]
        assert command is not None, f"edgedistill {verb}"
        if hasattr(command, "commands"):
            assert sub in command.commands, f"edgedistill {verb} {sub}"


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
