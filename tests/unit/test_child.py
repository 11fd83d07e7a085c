"""Children die with the process that started them, and every child of ours that may outlive a build is started so."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedistill.child import bound

PACKAGE = Path(__file__).parents[2] / "edgedistill"
# Its inner half ends with a pipe that it reads: it is root in a namespace of its own, and a change of rights clears the signal.
OTHER_WAYS = {"data/sandbox.py"}

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has ended")


def ends(pid: int, seconds: float = 20) -> bool:
    """Tell whether a process that is no child of ours ends in that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if (
                Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            ):  # ended, and nobody asked yet
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def killed_with_child(code: str, folder: Path) -> int:
    """Run a parent that starts a child which writes its pid to ``folder``/pid; kill the parent alone, return that pid."""
    sleeper = (
        "import os, time; open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid'); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import signal, subprocess, sys\nchild = [sys.executable, '-c', {sleeper!r}]\n{code}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    until = time.monotonic() + 60
    while not (folder / "pid").exists():
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    return int((folder / "pid").read_text())


@on_linux
@pytest.mark.parametrize(
    "code",
    [
        "from edgedistill.child import bound; subprocess.run(bound(child))",
        "from edgedistill.child import bound; subprocess.run(bound(child, signal.SIGTERM), start_new_session=True)",
        "from edgedistill.formats.onnx.build import _run; _run(child, 2, None)",
    ],
    ids=["killed", "terminated", "onnx builder"],
)
def test_a_child_dies_with_a_parent_that_is_killed(code: str, tmp_path: Path) -> None:
    pid = killed_with_child(code, tmp_path)
    try:
        assert ends(pid)
    finally:
        if not ends(pid, 0.1):
            os.kill(pid, signal.SIGKILL)


@on_linux
def test_a_parent_that_was_dead_before_starts_nothing(tmp_path: Path) -> None:
    command = bound(["touch", str(tmp_path / "started")])
    assert command[5] == str(os.getpid())
    command[5] = "1" if os.getpid() != 1 else "2"
    subprocess.run(command, check=False)
    assert not (tmp_path / "started").exists()


def test_a_bound_command_is_run_as_it_is(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['PYTHONPATH'], sys.stdin.read()); sys.exit(7)"
    done = subprocess.run(
        bound([sys.executable, "-c", code, "-I", "a b", ""]),
        input="told",
        env={**os.environ, "PYTHONPATH": "/of/ours"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "['-I', 'a b', ''] /of/ours told\n")


def test_every_process_that_runs_beside_us_is_bound() -> None:
    """`subprocess.run` is left out: what is run so (pip, a check) writes to a folder of its own, and ends by itself."""
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("subprocess.Popen", "Popen"):
                continue
            seen.add(name)
            command = node.args[0]
            is_bound = isinstance(command, ast.Call) and ast.unparse(command.func) == "bound"
            assert is_bound != (name in OTHER_WAYS), f"{name}:{node.lineno}"
    assert seen >= {
        "formats/onnx/build.py",
        "formats/gguf/quantize.py",
        "devices/local.py",
        "teachers/vllm.py",
        *OTHER_WAYS,
    }
