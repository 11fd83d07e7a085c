"""Measuring on this machine: real processes, a real llama.cpp, a model of random weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edgedistill.artifact import has_chat_template
from edgedistill.cli import app
from edgedistill.devices import local
from edgedistill.devices.local import Local, Worker, artifact_size, measure, measure_ratio, noise_of
from edgedistill.devices.protocol import (
    Device,
    Latencies,
    Measurement,
    RatioMeasurement,
    Samples,
    Settings,
    again_if_noisy,
    percentile,
)
from edgedistill.devices.table import bench_table
from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.read import read_info

QUICK = Settings(threads=1, context=256, pp=64, tg=16, reps=3, answer_tokens=4)
PROMPTS = [[{"role": "user", "content": "ab" * n}] for n in range(1, 5)]


@pytest.fixture(scope="module")
def measured(tiny_gguf: Path) -> Measurement:
    return measure(tiny_gguf, QUICK, prompts=PROMPTS)


def test_measurement_has_everything_that_a_speed_must_state(tiny_gguf: Path, measured: Measurement) -> None:
    assert (measured.pp.n, measured.tg.n) == (3, 3)
    assert min(*measured.pp.values, *measured.tg.values) > 0
    assert measured.file_size == tiny_gguf.stat().st_size
    assert measured.runner["engine"] == "llama.cpp"
    assert "ggml" in measured.runner["commit"]
    assert measured.runner["build"]
    assert measured.ttft is not None
    assert measured.request is not None
    assert measured.ttft.n == measured.request.n == len(PROMPTS)
    assert all(first <= last for first, last in zip(measured.ttft.values, measured.request.values, strict=True))
    assert list(measured.prompt_tokens) == sorted(measured.prompt_tokens)
    assert measured.peak_rss > measured.runner_rss > 1 << 20
    assert measured.load_seconds > 0
    assert 0 < measured.bandwidth_share < 20  # its weights fit into the cache


def test_measurement_survives_json(measured: Measurement) -> None:
    data = json.loads(json.dumps(measured.to_json()))
    assert Measurement.from_json(data) == measured
    assert data["settings"]["batch"] == 2048
    assert data["settings"]["micro_batch"] == 512
    assert data["noisy"] == bool(data["noise"])


def test_table_states_machine_build_and_counts(measured: Measurement) -> None:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(bench_table([measured]))
    text = capture.get()
    for wanted in ("tiny.gguf", "pp64", "tg16", "(n = 4)", "GB/s", "1 threads", "ggml", "load average", "intervals"):
        assert wanted in text


def test_a_file_without_a_chat_template_has_all_speeds_but_the_time_to_first_token(
    bare_gguf: Path, tiny_gguf: Path, tiny_onnx: Path
) -> None:
    assert [has_chat_template(path) for path in (bare_gguf, tiny_gguf, tiny_onnx)] == [False, True, True]
    found = CliRunner().invoke(app, ["bench", str(bare_gguf), "-r", "1", "--context", "256", "--json"])
    assert found.exit_code == 0 and "no chat template, so no time to first token" in found.output
    (told,) = json.loads(found.output[found.output.index("[") :])
    assert told["ttft_ms"] is None and told["pp"]["values"] and told["tg"]["values"]


def test_progress_counts_to_its_total(tiny_gguf: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    measure(tiny_gguf, QUICK, prompts=PROMPTS[:1], progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert {total for _, total, _ in seen} == {len(seen)}


def test_tied_embedding_is_read_whole_and_an_untied_one_by_the_row(tiny_gguf: Path, larger_gguf: Path) -> None:
    with Worker(tiny_gguf, 1) as tied, Worker(larger_gguf, 1) as untied:
        whole, info = read_info(tiny_gguf).tensor_bytes, read_info(larger_gguf)
        row = 4 * info.hidden
        assert tied.loaded["bytes_per_token"] == whole
        assert untied.loaded["bytes_per_token"] == info.tensor_bytes - (info.vocab - 1) * row


def test_ratio_is_taken_in_turns_and_finds_the_faster_one(tiny_gguf: Path, larger_gguf: Path) -> None:
    ratio = measure_ratio(tiny_gguf, larger_gguf, QUICK)
    assert ratio.tg.ours.n == ratio.tg.baseline.n == 8
    assert ratio.tg.low <= ratio.tg.value <= ratio.tg.high
    assert ratio.tg.value > 1.5
    assert ratio.pp.value > 1.5
    assert RatioMeasurement.from_json(json.loads(json.dumps(ratio.to_json()))) == ratio


def test_prompt_that_does_not_fit_is_the_users_error(tiny_gguf: Path) -> None:
    with pytest.raises(UsageError, match="do not fit a context of 256"):
        measure(tiny_gguf, QUICK, prompts=[[{"role": "user", "content": "ab" * 1024}]])


def test_model_without_chat_template_measures_without_prompts_only(bare_gguf: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        measure(bare_gguf, QUICK, prompts=PROMPTS)


@pytest.mark.parametrize("name", ["nothing.gguf", "model.safetensors", "folder"])
def test_what_is_no_artifact(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"no such artifact|neither a \.gguf file"):
        artifact_size(tmp_path / name)


def test_truncated_model_is_refused_with_its_name(tiny_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"cut\.gguf.*cut short"):
        measure(cut, QUICK)


def test_runner_that_dies_is_a_failed_step_that_names_the_artifact(tiny_gguf: Path) -> None:
    with Worker(tiny_gguf, 1) as worker:
        worker.process.kill()
        with pytest.raises(
            StepFailed, match=r"tiny\.gguf: the process that ran it was killed by signal 9 during prompt"
        ):
            worker.ask("prompt", n=8)


def test_noise_is_named() -> None:
    quiet, loud = Samples(values=(100.0, 101.0, 99.0)), Samples(values=(100.0, 50.0, 99.0))
    assert noise_of({"tg": quiet}, 0.1, 1) == ()
    reasons = noise_of({"pp": quiet, "tg": loud}, 0.9, local.fingerprint().cores + 1)
    assert [reason.split()[0] for reason in reasons] == ["tg", "other", str(local.fingerprint().cores + 1)]


def test_noisy_measurement_says_so_in_the_table(measured: Measurement) -> None:
    import dataclasses

    console = Console(width=200)
    with console.capture() as capture:
        console.print(bench_table([dataclasses.replace(measured, noise=("tg varies by 17.1%",))]))
    assert "(noisy)" in capture.get()
    assert "NOISY: tg varies by 17.1%" in capture.get()


def test_samples_and_percentiles() -> None:
    samples = Samples(values=(1.0, 2.0, 3.0, 4.0))
    assert (samples.median, samples.mean, samples.n) == (2.5, 2.5, 4)
    assert samples.sd == pytest.approx(1.2909944)
    low, high = samples.interval
    assert low <= 2.5 <= high
    assert Samples(values=(7.0,)).spread == 0
    latencies = Latencies(values=tuple(float(n) for n in range(101)))
    assert (latencies.p50, latencies.p95, latencies.p99) == (50, 95, 99)
    assert percentile([3.0], 0.99) == 3.0


def test_this_machine_is_a_device() -> None:
    device: Device = Local()
    assert device.fingerprint() == local.fingerprint()


@pytest.mark.parametrize(
    ("noises", "kept"), [([(), ("never",)], 0), ([("load",), ()], 1), ([("load",), ("worse",)], 1)]
)
def test_a_noisy_measurement_is_taken_once_more_and_the_second_stands(
    measured: Measurement, noises: list[tuple[str, ...]], kept: int
) -> None:
    runs = iter(dataclasses.replace(measured, noise=noise) for noise in noises)
    said: list[str] = []
    assert again_if_noisy(lambda: next(runs), said.append).noise == noises[kept]
    assert len(said) == kept
