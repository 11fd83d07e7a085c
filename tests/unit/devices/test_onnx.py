"""The same measurements of an ONNX model, through onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.devices.local import Worker, measure, measure_ratio
from edgedistill.devices.protocol import Settings
from edgedistill.errors import EdgeDistillError, UsageError

QUICK = Settings(threads=1, context=256, pp=64, tg=16, reps=3, answer_tokens=4)

pytestmark = pytest.mark.onnx


def test_onnx_is_measured_as_a_gguf_is(tiny_onnx: Path) -> None:
    measured = measure(tiny_onnx, QUICK, prompts=[[{"role": "user", "content": "ab" * n}] for n in (1, 2, 3)])
    assert measured.format == "onnx"
    assert measured.runner["engine"] == "onnxruntime-genai"
    assert measured.runner["commit"].startswith("onnxruntime ")
    assert measured.pp.n == measured.tg.n == 3
    assert measured.ttft is not None
    assert measured.ttft.n == 3
    assert measured.prompt_tokens == tuple(2 * n + measured.prompt_tokens[0] - 2 for n in (1, 2, 3))
    assert not measured.bytes_exact
    assert measured.file_size > measured.bytes_per_token > 0
    assert measured.peak_rss > measured.runner_rss


def test_onnx_against_gguf_in_one_session(tiny_onnx: Path, tiny_gguf: Path) -> None:
    ratio = measure_ratio(tiny_onnx, tiny_gguf, QUICK)
    assert [runner["engine"] for runner in ratio.runners] == ["onnxruntime-genai", "llama.cpp"]
    assert ratio.tg.low <= ratio.tg.value <= ratio.tg.high


def test_prompt_longer_than_the_context_is_the_users_error(tiny_onnx: Path) -> None:
    with pytest.raises(UsageError, match="do not fit a context of 256"):
        measure(tiny_onnx, QUICK, prompts=[[{"role": "user", "content": "ab" * 200}]])


def test_broken_onnx_is_refused_with_its_name(tiny_onnx: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_onnx.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:100] if file.suffix == ".onnx" else file.read_bytes())
    with pytest.raises(EdgeDistillError, match=r"broken.*cannot load"), Worker(broken, 1):
        pass


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("{", r"genai_config\.json: not valid JSON"),
        ("{}", r"genai_config\.json: says nothing of a model"),
        ('{"model": {}}', "onnxruntime-genai cannot load it"),
    ],
)
def test_onnx_without_settings_is_refused_by_file(settings: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(settings)
    with pytest.raises(UsageError, match=told):
        measure(tmp_path, Settings(threads=1, reps=1))
