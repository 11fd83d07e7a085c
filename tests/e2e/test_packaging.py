"""What is installed: the wheel has all that the checkout has, and every dependency is pinned, ranged and used."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
# What a requirement is imported as, where it is not its own name. None: used as a program or by another library.
IMPORTED_AS: dict[str, str | None] = {
    "llama-cpp-python": "llama_cpp",
    "pip": None,  # run as a program by `pypi:` models
    "antlr4-python3-runtime": None,  # math-verify reads LaTeX by it, in the one version that its grammar was made with
    "onnx": None,  # onnx, onnx-ir: imported by onnxruntime-genai's builder, which does not require them
    "onnx-ir": None,
    "onnxruntime": None,  # what onnxruntime-genai runs on; named for its version, which artifacts record
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirement: str) -> tuple[str, str]:
    """Return the name and the extras of a requirement."""
    found = re.match(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?", requirement)
    assert found
    return normal(found[1]), found[2] or ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_the_package_its_data_and_the_targets(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edgedistill").rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    targets = {f"edgedistill/_targets/{path.name}" for path in (ROOT / "targets").glob("*.toml")}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files | targets
    assert len(targets) >= 8
    for name in targets:
        assert wheel.read(name) == (ROOT / "targets" / Path(name).name).read_bytes()


def test_wheel_has_licence_and_entry_point(wheel: zipfile.ZipFile) -> None:
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "edgedistill = edgedistill.cli:main" in wheel.read(entry).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_version_is_one() -> None:
    from edgedistill import __version__

    assert __version__ == PROJECT["version"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


OPTIONAL = [*PROJECT["optional-dependencies"]["onnx"], *PROJECT["optional-dependencies"]["reasoning"]]


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *OPTIONAL])
def test_requirement_is_imported(requirement: str) -> None:
    name, _ = required(requirement)
    module = IMPORTED_AS.get(name, name.replace("-", "_"))
    if module is None:
        return
    found = re.compile(rf"^\s*(import|from) {module}\b|__import__\(\"{module}\"\)", re.MULTILINE)
    assert any(found.search(path.read_text()) for path in (ROOT / "edgedistill").rglob("*.py")), f"{name} is not used"


def test_everything_that_gets_installed_is_pinned_as_it_is_here() -> None:
    """Walk from our requirements, extras included, through what is installed; each has this very version's pin."""
    from packaging.requirements import Requirement

    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    todo += [Requirement(text) for group in PROJECT["optional-dependencies"].values() for text in group]
    seen: set[tuple[str, frozenset[str]]] = set()
    unpinned, different = set(), set()
    pins = {normal(name): version for name, version in PINS.items()}
    while todo:
        requirement = todo.pop()
        name = normal(requirement.name)
        step = (name, frozenset(requirement.extras))
        if step in seen or name in ("pip", "setuptools"):  # they come with the environment
            continue
        seen.add(step)
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra that is not installed here
        version = installed.version.partition("+")[0]
        if name not in pins:
            unpinned.add(f"{name}=={version}")
        elif pins[name] != version:
            different.add(f"{name}: {version} is installed, {pins[name]} is pinned")
        for text in installed.requires or ():
            below = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if below.marker is None or any(below.marker.evaluate(environment) for environment in environments):
                todo.append(below)
    assert not unpinned
    assert not different
