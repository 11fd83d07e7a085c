"""A profile that chooses by speed: what its file of costs may be, what nothing reaches, and what stays out of keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.devices.host import fingerprint
from edgedistill.errors import RecipeError
from edgedistill.fingerprint import Key
from edgedistill.refusals_auto import refuse_auto, speeds_of
from edgedistill.stages.allocate import Allocate
from edgedistill.target import Target, check_target
from tests.unit.devices.test_kernels import some_kernels

CONFIG = {
    "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 1000, "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def target(folder: Path, *, limits: str = "", threads: int = 2, runtime: str = 'kernels = "costs/here.json"') -> Target:
    """Write a profile of this machine's class, and read it."""
    path = folder / "board.toml"
    path.write_text(
        f'summary = "a class of boards"\narch = "{fingerprint().arch}"\n[runtime]\nformat = "gguf"\nengine = "llama.cpp"\n'
        f"threads = {threads}\ncontext = 512\n{runtime}\n"
        f'[quantize]\ntype = "auto"\nimatrix = true\n[limits]\nfile_size = "600 MiB"\n{limits}'
    )
    return check_target(path)


def pinned(folder: Path, **changes: Any) -> None:
    (folder / "costs").mkdir(exist_ok=True)
    (folder / "costs" / "here.json").write_text(json.dumps({**some_kernels().to_json(), **changes}))


def test_costs_are_found_beside_the_profile_and_their_figures_are_what_counts(tmp_path: Path) -> None:
    pinned(tmp_path)
    one = target(tmp_path, limits="pp512 = 10.0\n")
    found = speeds_of(one)
    assert found is not None
    assert found == {
        "pp512": {
            "least": 10.0, "margin": 0.05, "weight": {"Q4_0": 1e-12, "Q8_0": 2e-12}, "fixed": 1e-6, "layer": 0.0, "column": 0.0
        }
    }  # fmt: skip
    assert speeds_of(target(tmp_path)) is None, "no speed is asked for"
    assert speeds_of(target(tmp_path, limits="pp512 = 10.0\n", runtime="")) is None

    def key(speeds: Any) -> str:
        return Allocate(model=Key("m"), sensitivity=Key("s"), size=9, tool="scipy", speeds=speeds).key()

    assert key(None) != key(found) != key({"pp512": {**found["pp512"], "least": 11.0}})
    assert "speeds" not in Allocate(model=Key("m"), sensitivity=Key("s"), size=9, tool="scipy").fields()
    assert one.to_json() == target(tmp_path, limits="pp512 = 10.0\n", runtime="").to_json()


def test_a_profile_warns_of_what_is_not_looked_at_and_of_doubtful_costs(tmp_path: Path) -> None:
    host = {**fingerprint().to_json(), "cores": 2}  # as many as the profile's threads, also where the tests have one
    pinned(tmp_path, noise=[], host=host)
    limits = "pp512 = 10.0\npeak_rss = '1 GiB'\nttft_p95_ms = 900\n"
    (told,) = refuse_auto(target(tmp_path, limits=limits, runtime=""), "this student", CONFIG)
    assert "does not look at pp512, peak_rss, ttft_p95_ms" in told and "edgedistill targets kernels" in told
    (told,) = refuse_auto(target(tmp_path, limits=limits), "this student", CONFIG)
    assert told == 'type = "auto" does not look at peak_rss, ttft_p95_ms: measuring tells whether they hold'
    assert refuse_auto(target(tmp_path, limits="tg128 = 10.0\n"), "this student", CONFIG) == []

    pinned(tmp_path, host={**host, "arch": "riscv64"}, runner={"version": "llama-cpp-python 0.1"})
    found = refuse_auto(target(tmp_path, limits="tg128 = 10.0\n"), "this student", CONFIG)
    assert ["measured on riscv64" in found[0], "kernels of llama-cpp-python 0.1" in found[1], "noisy" in found[2]] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("changes", "threads", "limits", "said"),
    [
        (None, 2, "", "runtime.kernels: .*here.json: cannot be read"),
        ({"schema": 2}, 2, "", "runtime.kernels: .*here.json: schema 2"),
        ({}, 4, "", "runtime.kernels: .*measured with 2 threads, and the target runs 4"),
        (
            {},
            2,
            "pp512 = 1e7\n",
            r"limits.pp512: no choice of types brings this student to 1e\+07 tokens/s: .* is predicted",
        ),
        ({}, 2, "file_size = 9\n", "limits.file_size: no type brings this student under 9 B"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_file_and_key(
    changes: dict[str, Any] | None, threads: int, limits: str, said: str, tmp_path: Path
) -> None:
    if changes is not None:
        pinned(tmp_path, **changes)
    one = target(tmp_path, limits="" if "file_size" in limits else limits, threads=threads)
    if "file_size" in limits:
        path = tmp_path / "board.toml"
        path.write_text(path.read_text().replace('"600 MiB"', "9"))
        one = check_target(path)
    with pytest.raises(RecipeError, match=said) as caught:
        refuse_auto(one, "this student", CONFIG)
    assert "board.toml" in str(caught.value) and caught.value.hint


def test_kernels_are_of_gguf_files(tmp_path: Path) -> None:
    text = (
        f'summary = "s"\narch = "{fingerprint().arch}"\n[runtime]\nformat = "onnx"\nengine = "onnxruntime-genai"\nthreads = 1\n'
        'context = 512\nkernels = "k.json"\n[quantize]\ntype = "int4"\n'
    )
    (tmp_path / "o.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"o\.toml:8: runtime.kernels: kernels are measured for gguf files"):
        check_target(tmp_path / "o.toml")
