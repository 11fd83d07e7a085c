"""The types of a target's KV cache in the plan: what they run anew, what is said of their memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import EdgeDistillError, RecipeError
from edgedistill.fingerprint import Key
from edgedistill.kv_cache import CHOICES, F16
from edgedistill.recipes import copy_recipe
from edgedistill.target import check_target, find_target, packaged_folder, to_toml
from tests.unit.test_plan import changed, make

NAME = "laptop-x86"
STEPS = {f"{step}/{NAME}" for step in ("evaluate", "measure", "package")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


def profile(folder: Path, kv_cache: str | None, *, name: str = NAME, **lines: str) -> Path:
    """Write a profile of the recipe's own that is the packaged one, but for its KV cache and the given keys."""
    text = (packaged_folder() / f"{name}.toml").read_text()
    for key, value in lines.items():
        (old,) = (line for line in text.splitlines() if line.split("=")[0].strip() == key)
        text = text.replace(old, f"{key} = {value}" if value else "")
    if kv_cache is not None:
        text = text.replace("[runtime]", f"[runtime]\nkv_cache = {kv_cache}")
    path = folder / "targets" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def stage(plan: Any, name: str) -> Any:
    (step,) = plan.match(name)
    return step.stage


def test_f16_changes_no_key(folder: Path) -> None:
    before = make(folder)
    for said in (None, '"f16"', '{ k = "f16" }'):
        profile(folder, said)
        assert changed(before, make(folder)) == set()
    assert "kv_cache" not in stage(before, f"package/{NAME}").target["runtime"]


def test_types_run_what_runs_the_file_anew_and_are_proved(folder: Path) -> None:
    before = make(folder)
    profile(folder, '{ k = "q8_0", v = "q4_0" }')
    after = make(folder)
    assert changed(before, after) == {*STEPS, f"kv-cache/{NAME}"}
    proof, package = stage(after, "kv-cache/*"), stage(after, f"package/{NAME}")
    assert (proof.types, proof.peak_rss, proof.context) == ((("q8_0", "q4_0"),), None, 2048)
    assert proof.model == package.model == stage(after, f"evaluate/{NAME}").model
    assert proof.text == after.match("calibrate")[0].key
    for name in ("evaluate", "measure"):
        assert stage(after, f"{name}/{NAME}").kv == ("q8_0", "q4_0")
        assert stage(after, f"{name}/student").kv == F16
    assert package.kv_cache == after.match("kv-cache/*")[0].key
    assert package.target["runtime"]["kv_cache"] == {"k": "q8_0", "v": "q4_0"}
    # 30 layers x 3 heads x 64 x 2048 tokens: 45 MiB in f16; 34 + 18 bytes for 64 values are 18.3 MiB.
    (said,) = (line for line in after.warnings if "KV cache" in line)
    assert said == f"{NAME}: a KV cache of 2048 tokens takes about 45 MiB in f16, 18.3 MiB in q8_0 / q4_0"


def test_auto_is_chosen_by_a_step_that_the_others_wait_for(folder: Path) -> None:
    profile(folder, '"auto"')
    plan = make(folder)
    choice = plan.match("kv-cache/*")[0]
    assert isinstance(choice.key, Key)
    assert stage(plan, "kv-cache/*").types == CHOICES and CHOICES[0] == F16
    assert stage(plan, "kv-cache/*").peak_rss == find_target(NAME, folder).limits.peak_rss
    for name in STEPS:
        assert choice.key in stage(plan, name).inputs()
    assert stage(plan, f"package/{NAME}").target["runtime"]["kv_cache"] == "auto"


def test_a_draft_is_measured_beside_the_file_with_its_own_cache(folder: Path) -> None:
    profile(folder, '"q8_0"')
    assert stage(make(folder, draft={"targets": [NAME]}), f"speculate/{NAME}").kv == ("q8_0", "q8_0")


def test_the_gate_repackages_alone_and_needs_a_cache(folder: Path) -> None:
    profile(folder, '"q8_0"')
    before, after = make(folder), make(folder, gates__max_kv_kld={NAME: 0.01})
    assert changed(before, after) <= {f"package/{name}" for name in before.packages}
    assert stage(after, f"package/{NAME}").gates["max_kv_kld"] == 0.01
    assert "max_kv_kld" not in stage(before, f"package/{NAME}").gates
    with pytest.raises(RecipeError, match=r"gates\.max_kv_kld names the target 'nowhere'"):
        make(folder, gates__max_kv_kld={"nowhere": 0.01})
    profile(folder, '"f16"')
    assert any("gates.max_kv_kld" in line for line in make(folder, gates__max_kv_kld=0.01).warnings)


@pytest.mark.parametrize(
    ("kv_cache", "lines", "student", "message"),
    [
        ('"q8"', {}, {}, r'kv_cache: expected .*"q8_0", .*"auto" or a table; found "q8"'),
        ('{ k = "q8_0", w = "q4_0" }', {}, {}, "kv_cache.w: unknown key"),
        ('"auto"', {"peak_rss": ""}, {}, '"auto" needs memory to keep to: write limits.peak_rss'),
        ('"q8_0"', {}, {"head_dim": 48}, "heads have 48 dimensions, and types other than f16 pack 32"),
        ('"auto"', {"peak_rss": '"50 MiB"'}, {}, "are over limits.peak_rss = 50 MiB"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(
    folder: Path, kv_cache: str, lines: dict[str, str], student: dict[str, Any], message: str
) -> None:
    path = profile(folder, kv_cache, **lines)
    overrides: dict[str, Any] = {"targets": [NAME], "quantize": {}, "tune": None, "gates": {}}
    with pytest.raises(EdgeDistillError, match=message) as found:
        make(folder, student=student, **overrides)
    assert str(found.value).startswith(str(path)) and "runtime.kv_cache" in str(found.value)


def test_onnx_has_no_such_types(folder: Path) -> None:
    path = profile(folder, '"q8_0"', name="laptop-x86-onnx")
    with pytest.raises(RecipeError, match=r"runtime\.kv_cache: types are chosen for the KV cache of llama\.cpp"):
        check_target(path)


def test_a_cache_that_does_not_fit_is_told_with_what_would(folder: Path) -> None:
    profile(folder, None, context="131072", peak_rss='"1.5 GiB"')
    (said,) = (line for line in make(folder).warnings if "KV cache" in line)
    # 131,072 tokens: 64 times the 45 MiB of 2,048; q4_0 takes 18/64 of that.
    assert "a KV cache of 131072 tokens, 2.8 GiB in f16, are over limits.peak_rss = 1.5 GiB" in said
    assert said.endswith('runtime.kv_cache = "auto" can bring it down to 810 MiB')
    profile(folder, '"q8_0"', context="131072")
    assert any("measured at 8192 tokens, the model's own context" in line for line in make(folder).warnings)


@pytest.mark.parametrize("said", ['"q8_0"', '{ k = "q8_0", v = "q4_0" }', '{ v = "q5_1" }', '"f16"'])
def test_a_profile_is_written_as_it_reads(folder: Path, tmp_path: Path, said: str) -> None:
    target = check_target(profile(folder, said))
    (tmp_path / "again.toml").write_text(to_toml(target))
    assert check_target(tmp_path / "again.toml").kv == target.kv
    assert ("kv_cache" in to_toml(target)) == (target.kv != F16)
