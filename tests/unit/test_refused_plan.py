"""What `plan` refuses: what cannot work, by file and key, before anything runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill import plan as plans
from edgedistill.devices.host import fingerprint
from edgedistill.errors import EdgeDistillError, RecipeError, UsageError
from edgedistill.pairing import tokens_differ
from edgedistill.plan import Plan, check_machine
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.target import find_target
from tests.tuned import TUNE
from tests.unit.test_plan import make, make_inputs

ULD: dict[str, Any] = {"score__kind": "dense", "distill__loss__divergence": "uld"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_recipe("quickstart", tmp_path / "quickstart")


@pytest.mark.parametrize(("kind", "temperature"), [("sampled", 2.0), ("sampled", 0.4), ("top-sampled", 1.6)])
def test_draws_that_the_loss_cannot_use_are_refused(folder: Path, kind: str, temperature: float) -> None:
    draws = {"score__kind": kind, "score__temperature": temperature}
    with pytest.raises(RecipeError, match=f"at temperature {temperature:g} cannot be re-weighted to .* = 1"):
        make(folder, **draws)
    near = max(0.5, min(temperature, 1.5))
    for use in ({"score__temperature": near}, {"score__kind": "top-k"}, {"distill__loss__temperature": temperature}):
        assert make(folder, **{**draws, **use})


@pytest.mark.parametrize(
    ("overrides", "student", "message"),
    [
        ({}, {"tokenizer": "other"}, "different tokenizers.*token by token"),
        ({"score__kind": "sampled", "distill__loss__divergence": "uld"}, {}, "sorts the teacher's whole distribution"),
        ({**ULD, "heal__hidden": 1.0}, {"tokenizer": "other"}, "have different tokenizers: their hidden states"),
        ({**ULD, "distill__on_policy": 0.5}, {}, "cannot read what the student writes"),
        ({**ULD, "heal__hidden": 0.0, "distill__features": {}}, {"tokenizer": "other"}, "stand at other places"),
        ({"distill__features__pairs": [[30, 0]]}, {}, r"\[30, 0\] is no pair of layers: the teacher's are 0 to 29"),
        ({"distill__features__pairs": [[0, 9]], "student__layers": 9}, {}, "the student's 0 to 8"),
        (
            {"distill__features__relations__angles": 1.0, "distill__accumulate": 4},
            {},
            "between 3 rows of a micro-batch",
        ),
        ({"distill__features__relations__distances": 1.0, "distill__batch_size": 1}, {}, "there the most are 1"),
        ({"distill__lora__targets": ["lm_head"]}, {}, "ties its head"),
        ({"adapt__lora__targets": ["q_proj", "embed_tokens"]}, {}, "ties its head"),
        ({"distill__method": "qlora"}, {}, "QLoRA needs a CUDA device"),
        ({"student__layers": 31}, {}, "has 30 layers"),
        ({"student__ffn": 1568}, {}, "has 1536 neurons"),
        ({"student__hidden": 608}, {}, "the hidden size of teacher is 576"),
        ({"student__hidden": 500}, {}, "500 is no multiple of 32"),
        ({"student__hidden": 512}, {"architecture": "gemma3"}, "only that of a Llama or Mistral can"),
        ({"student__ffn": 700}, {}, "700 is no multiple of 32"),
        ({"distill__loss__divergence": "reverse-kl"}, {}, "cannot be estimated from draws"),
        ({"distill__loss__divergence": "jsd", "distill__loss__temperature": 1.3}, {}, "at temperature 1.3"),
        ({"distill__loss__share": 0.2}, {}, "no mixture"),
        ({"tune": {**TUNE, "targets": ["laptop-x86-onnx"]}}, {}, "is an ONNX target"),
        ({"tune": {**TUNE, "targets": ["nowhere"]}}, {}, "names the target 'nowhere'"),
        ({"tune": {**TUNE, "skip": [1200]}}, {}, "has 1 counts for 2 files"),
        ({"tune": {**TUNE, "skip": 99999}}, {}, "leaves out 99999 rows"),
        ({"tune": TUNE}, {"architecture": "qwen2"}, "the llama family"),
        ({"student__vocabulary": 50000}, {}, "has 49152 tokens"),
        (
            {"student__vocabulary": 255},
            {},
            r"student\.vocabulary: 256 tokens spell whatever is written.* 255 are fewer",
        ),
        ({"suites__holdout__files": ["data/train.jsonl"]}, {}, "stands in the training rows and in the suite"),
        ({"heal__files": ["data/holdout.jsonl"], "heal__rows": 9}, {}, "stands in the training rows and in the suite"),
        ({"suites__ood__files": ["data/holdout.jsonl"]}, {}, "stands in the suite 'holdout' and in the suite 'ood'"),
        ({"prompts__files": ["data/nothing.jsonl"], "prompts__rows": 9}, {}, "no such file"),
        ({"suites__holdout__grammar": "no.gbnf"}, {}, r"suites\.holdout\.grammar: .*No such file"),
        ({"suites__holdout__grammar": "binary.gbnf"}, {}, r"suites\.holdout\.grammar: .*not UTF-8 at byte 0"),
        ({"baselines__quantized_teacher": "Q4"}, {}, r"baselines\.quantized_teacher: unknown GGUF type 'Q4'"),
        (
            {"draft": {"targets": ["laptop-x86"], "type": "IQ2_XS"}},
            {},
            r"draft\.type: IQ2_XS needs an importance matrix",
        ),
        ({"distill__lora__targets": ["q_proj", "query"]}, {}, r"distill\.lora\.targets: llama has no query"),
        ({"adapt__lora__targets": ["c_attn"]}, {}, r"adapt\.lora\.targets: llama has no c_attn"),
    ],
)
def test_what_cannot_work_is_refused_with_the_file_and_the_key(
    folder: Path, overrides: dict[str, Any], student: dict[str, Any], message: str
) -> None:
    (folder / "binary.gbnf").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=message) as caught:
        make(folder, student=student, **overrides)
    assert "recipe.toml" in str(caught.value)
    assert caught.value.hint


def test_other_tokens_are_compared_by_rank_and_the_remedy_says_so(folder: Path) -> None:
    other = {"tokenizer": "other"}
    with pytest.raises(RecipeError) as error:
        make(folder, student=other)
    assert 'distill.loss.divergence = "uld"' in error.value.hint and 'score.kind = "none"' in error.value.hint
    plan = make(folder, student=other, **ULD, heal__hidden=0.0)
    (distill,) = plan.match("distill/1")
    assert plan.match("adapt")[0].key in distill.stage.inputs()
    assert make(folder, student=other, score__kind="none", distill__loss={"kd": 0.0, "ce": 1.0}, heal__hidden=0.0)


def test_the_same_tokens_cut_in_another_way_are_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    """A tokenizer that was rebuilt without the rule that splits digits: the same vocabulary, other tokens for numbers."""
    from tests.unit.formats.gguf.conftest import make_tokenizer

    given = make_inputs(folder, heal__hidden=0.0)
    models = []
    for name, pre in (("teacher", "smollm"), ("student", "gpt-2"), ("copy", "smollm")):
        make_tokenizer(tmp_path / name, pre)
        path = tmp_path / name / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["vocab"]["20"] = len(data["model"]["vocab"])
        data["model"]["merges"].append(["2", "0"])
        path.write_text(json.dumps(data))
        models.append(dataclasses.replace(given.teacher, path=tmp_path / name))
    rows = [dataclasses.replace(given.prompts[0], id="r", messages=({"role": "user", "content": text},)) for text in
            ("no number", "in 2030")]  # fmt: skip
    assert tokens_differ(models[0], models[2], rows) == ""
    said = tokens_differ(models[0], models[1], rows)
    assert said == "have the same tokens, but cut the text of row 'r' differently"
    assert tokens_differ(models[0], models[1], []) == ""


def test_a_limit_that_no_type_can_meet_is_refused(folder: Path) -> None:
    local = folder / "targets"
    local.mkdir(exist_ok=True)
    profile = find_target("phone-midrange", folder)
    assert profile.path is not None
    lines = [
        'file_size = "5 MiB"' if line.startswith("file_size") else line
        for line in profile.path.read_text().splitlines()
    ]
    (local / "phone-midrange.toml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="no type brings this student under 5 MiB"):
        make(folder)


def test_a_model_too_big_for_the_memory_is_refused(folder: Path) -> None:
    (step, *_) = make(folder).steps
    with pytest.raises(UsageError, match="of memory; this machine has"):
        check_machine(Plan(identity="x", steps=[dataclasses.replace(step, memory=10**15)]))


def test_the_memory_is_what_a_container_leaves_of_the_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_memory(size: int) -> None:
        host = dataclasses.replace(fingerprint(), memory_bytes=size)
        monkeypatch.setattr(plans, "fingerprint", lambda: host)

    (step, *_) = make(folder).steps
    plan = Plan(identity="x", steps=[dataclasses.replace(step, memory=2 << 30)])
    with_memory(2 << 30)
    check_machine(plan)
    with_memory(1 << 30)
    with pytest.raises(UsageError, match="needs about 2 GiB of memory; this machine has 1 GiB") as error:
        check_machine(plan, "rent a larger one")
    assert error.value.hint == "rent a larger one"
    with_memory(0)  # not known
    check_machine(plan)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("warmup     = 0.06", "warmupp    = 0.06"), r"recipe\.toml:\d+: heal\.warmupp.*warmup"),
        (("hidden     = 150", 'hidden     = "much"'), r"recipe\.toml:\d+: heal\.hidden"),
        (("[score]", "[scores]"), r"scores.*score"),
        (("seed    = 0", "seed    = "), r"recipe\.toml:\d+"),
        (('kind = "sampled"', 'kind = "sampel"'), r"score\.kind.*sampled"),
        (
            ("[calibrate]", '[distill.features]\ndistance = "l2"\n[calibrate]'),
            r"recipe\.toml:\d+: distill\.features\.distance.*mse",
        ),
        (("[calibrate]", "[distill.features]\npair = 1\n[calibrate]"), r"distill\.features\.pair\b.*pairs"),
        (("[calibrate]", "[distill.features]\npairs = [[1, -1]]\n[calibrate]"), r"distill\.features\.pairs"),
        (("n    = 12", "n    = 256"), r"score\.n.*255"),
        (('kind = "sampled"\nn    = 12', 'kind = "top-sampled"\nn    = 2'), "top-sampled needs an n of 3 or more"),
        (("beta2      = 0.95", 'optimizer  = "lion"'), r"heal\.optimizer.*adafactor"),
        (
            ("epochs     = 1\nbatch_size = 8\n\n[calibrate]", "think_weight = 2.0\n\n[calibrate]"),
            "think_weight needs generate",
        ),
        (("batch_size = 8\n\n[calibrate]", "on_policy = 0.5\n\n[calibrate]"), "on_policy needs the teacher beside"),
        (
            ('metric    = "json-exact"\notherwise', "max_words = 9\notherwise"),
            r'max_words: this is for kind = "thinking"',
        ),
        (("max_new_tokens = 64", 'style = "tool-traces"'), r"generate\.style.*rationale"),
        (("holdout = 0.90, ood", "houldout = 0.90, ood"), "houldout"),
    ],
)
def test_a_wrong_key_is_told_with_its_line(folder: Path, edit: tuple[str, str], message: str) -> None:
    path = folder / "recipe.toml"
    text = path.read_text()
    assert edit[0] in text
    path.write_text(text.replace(edit[0], edit[1], 1))
    with pytest.raises(EdgeDistillError, match=message):
        load_recipe(path)


def test_rows_from_two_files_must_not_share_ids(folder: Path) -> None:
    rows = [{"id": "same", "prompt": "a", "reference": "b"}]
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(RecipeError, match="two rows have the id 'same'"):
        make(folder, prompts__files=["one.jsonl", "two.jsonl"])
