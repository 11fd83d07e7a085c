"""The command on the card of an ONNX package answers as the model was scored."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgedistill.artifact import commands
from edgedistill.data.prompts import Row
from tests.unit.stages.test_package_draft import manifest

pytestmark = pytest.mark.onnx


def test_the_command_of_an_onnx_package_answers_its_example(tiny_onnx: Callable[[str], Path], tmp_path: Path) -> None:
    from edgedistill.evals.runners.onnx import OnnxRunner

    example = [
        {"role": "system", "content": "Answer with one function call."},
        {"role": "user", "content": 'don\'t wake me at "7:45"'},
    ]
    (tmp_path / "onnx").symlink_to(tiny_onnx("fp32"))
    of = replace(manifest({}), format="onnx", example=example, generation={"context": 200, "max_new_tokens": 12})
    line = next(one for one in commands(of) if one.startswith("python "))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with OnnxRunner(tiny_onnx("fp32"), threads=1) as runner:
        (answer,) = runner.answer([Row(id="1", messages=tuple(example))], max_new_tokens=12)
    assert len(answer.token_ids) == 12 and run.stdout == answer.text + "\n"
