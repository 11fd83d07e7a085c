"""What ships beside a model: its draft, where it brings something, and what the manifest and the card say of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedistill.artifact import Manifest, commands, model_card, read_manifest, write_files
from edgedistill.fingerprint import Key, file_digest
from edgedistill.gates import draft_refused
from edgedistill.stages.package import DraftedPackage
from tests.unit.devices.conftest import write_tiny

MODEL, DRAFT, DRAFTING, OTHER = (Key(letter * 64) for letter in "abcd")


def drafting(low: float, high: float, **changes: Any) -> dict[str, Any]:
    verdict = "helped" if low > 1 else "hurt" if high < 1 else "undecided"
    ratio = {"value": (low + high) / 2, "low": low, "high": high, "n": 64}
    share = {"value": 0.81, "low": 0.78, "high": 0.84, "n": 900}
    return {
        "acceptance": share, "tokens_per_check": {**share, "value": 2.4, "low": 2.3, "high": 2.5}, "answer": ratio,
        "decode": ratio, "prompts": 64, "ties": 0, "peak_rss": 200 * 2**20, "runner": {"version": "llama-cpp-python 1"},
        "noise": [], "verdict": verdict, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "limits", "why"),
    [
        (drafting(1.1, 1.3), {}, ""),
        (drafting(1.1, 1.3), {"file_size": 1000, "peak_rss": 200 * 2**20}, ""),
        (drafting(0.9, 1.2), {}, "no sooner with it, as far as can be told: 1.05x [0.90, 1.20], n = 64"),
        (drafting(0.7, 0.9), {}, "answers come later with it: 0.80x [0.70, 0.90], n = 64"),
        (drafting(1.1, 1.3), {"file_size": 999}, "limits.file_size is 999 B"),
        (drafting(1.1, 1.3), {"peak_rss": 200 * 2**20 - 1}, "limits.peak_rss is 200 MiB"),
    ],
)
def test_a_draft_ships_if_it_helps_and_fits(found: dict[str, Any], limits: dict[str, Any], why: str) -> None:
    refused = draft_refused(found, limits, 1000)
    assert why in refused
    assert bool(refused) == bool(why)


def stage(**fields: Any) -> DraftedPackage:
    plain: dict[str, Any] = {
        "model": MODEL, "file": "model.gguf", "evaluation": OTHER, "measurement": OTHER, "teacher": OTHER, "student": None,
        "reference": None, "recipe": "r", "target": {"name": "t", "limits": {}}, "unproved": "", "gates": {}, "sources": (),
        "generation": {}, "grammar": None, "ship_anyway": False, "example": (), "upstream": {}, "draft": DRAFT,
        "drafting": DRAFTING,
    }  # fmt: skip
    return DraftedPackage(**{**plain, **fields})


def context(tmp_path: Path, facts: dict[str, Any]) -> Any:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "model.gguf").write_bytes(b"draft")
    (tmp_path / "out").mkdir()
    files = {"model.gguf": SimpleNamespace(sha256=file_digest(tmp_path / "draft" / "model.gguf"))}
    return SimpleNamespace(
        out=tmp_path / "out",
        path=lambda key, name: tmp_path / "draft" / name,
        facts=lambda key: {"drafting": facts, "tokens": 3, "min_probability": 0.25},
        entries={DRAFT: SimpleNamespace(files=files)},
    )


def test_the_draft_lies_beside_the_model_unless_it_brings_nothing(tmp_path: Path) -> None:
    for name, low, shipped in (("good", 1.1, True), ("bad", 0.8, False)):
        (tmp_path / name).mkdir()
        ctx = context(tmp_path / name, drafting(low, low + 0.1))
        found = stage().add_draft(ctx, 100)
        assert (ctx.out / "draft.gguf").exists() == shipped
        assert bool(found["refused"]) != shipped
        assert found["unproved"] == ""
        assert (found["size"], found["tokens"], found["min_probability"]) == (5, 3, 0.25)
        assert found["digest"] == file_digest(tmp_path / name / "draft" / "model.gguf")


def manifest(draft: dict[str, Any]) -> Manifest:
    return Manifest(
        recipe="r", target={"name": "t", "summary": "A board"}, format="gguf", keys={}, digests={}, sources=[], evaluation={},
        teacher={}, measurement={}, gates=[], generation={"context": 2048, "max_new_tokens": 40}, size=100, example=[],
        tools={}, draft=draft,
    )  # fmt: skip


def test_manifest_and_card_say_what_the_draft_brings_and_how_to_run_both(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.gguf")
    (tmp_path / "draft.gguf").write_bytes(b"draft")
    brought = {
        "drafting": drafting(1.2, 1.4, noise=["others were busy"]),
        "tokens": 3,
        "min_probability": 0.25,
        "size": 5,
        "digest": "e",
        "refused": "",
        "unproved": "measured on x86_64",
    }
    write_files(tmp_path, manifest(brought), grammar=None)
    read = read_manifest(tmp_path)
    assert read.files["draft.gguf"] == file_digest(tmp_path / "draft.gguf")
    assert read.draft["drafting"]["acceptance"]["value"] == 0.81
    assert commands(read)[0].startswith(
        "llama-server -m model.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max 3 --spec-draft-p-min 0.25 "
    )
    card = (tmp_path / "README.md").read_text()
    assert "- whole answers: 1.30x [1.20, 1.40] as fast as without, n = 64 prompts" in card
    assert "0.810 [0.780, 0.840] of them kept (n = 900 tokens)" in card
    assert "- speeds are unproved for the target: measured on x86_64" in card
    assert "- **noisy**: do not rely on these speeds: others were busy" in card
    assert "-md draft.gguf" in card


def test_a_refused_draft_is_told_with_its_numbers_and_no_command_names_it() -> None:
    found = drafting(0.7, 0.9)
    refused = {"drafting": found, "tokens": 3, "min_probability": 0.0, "size": 5, "digest": "e", "unproved": ""}
    refused["refused"] = draft_refused(found, {}, 1)
    told = manifest(refused)
    card = model_card(told, grammar=False)
    assert "None is in this package: answers come later with it: 0.80x [0.70, 0.90]" in card
    assert "-md" not in card
    assert not any("-md" in line for line in commands(told))


def test_without_a_draft_the_manifest_is_what_it_was(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model.gguf")
    write_files(tmp_path, manifest({}), grammar=None)
    assert "draft" not in json.loads((tmp_path / "manifest.json").read_text())
    assert read_manifest(tmp_path).draft == {}
    assert "Draft" not in (tmp_path / "README.md").read_text()
