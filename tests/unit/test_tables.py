"""Tables off a terminal and on one: nothing cut off, partial builds, hostile text, and what imports cost."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgedistill import tables
from edgedistill.errors import GateMissed
from edgedistill.report import collect
from edgedistill.runner import Outcome
from edgedistill.session import Session, rows_of
from edgedistill.store import Store
from edgedistill.target import format_size, list_targets
from tests.unit.made_build import TARGETS, make_session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("tables"), ship=TARGETS)


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("partial"), keep=lambda name: name.split("/")[0] in ("base", "adapt"))


def printed(table: Any, capsys: pytest.CaptureFixture[str]) -> str:
    tables.print_table(table)
    return capsys.readouterr().out


def test_a_plan_names_steps_reasons_and_needs(partial: Session, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(partial)
    text = printed(tables.plan_table(partial, rows), capsys)
    for step in partial.plan.steps:
        assert ", ".join(step.ids) in text
    lines = {line.split()[0].rstrip(","): line for line in text.splitlines() if line.strip()}
    assert "cached" in lines["adapt"] and "never built" in lines["generate"]
    assert f"of {len(rows)} to run" in lines["total"]
    (heal,) = partial.plan.match("heal")
    assert format_size(heal.memory) in lines["heal"] and format_size(heal.disk) in lines["heal"]
    assert "…" not in text


def test_a_plan_as_json_adds_up(partial: Session) -> None:
    found = tables.plan_json(partial, rows_of(partial))
    json.dumps(found, allow_nan=False)
    todo = [step for step in found["steps"] if step["status"] != "cached"]
    assert found["to_run"] == len(todo) > 0
    assert found["disk"] == sum(step["disk"] for step in todo)
    assert found["seconds"] == pytest.approx(sum(step["seconds"] for step in todo), abs=0.1)


def test_the_table_of_a_build_has_one_line_a_model(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [session.path.parent / "dist" / "quickstart" / name for name in TARGETS]
    text = printed(tables.build_table(session, Outcome(), folders), capsys)
    rows = text.splitlines()
    order = [next(i for i, row in enumerate(rows) if row.startswith(model.label)) for model in collect(session).models]
    assert order == sorted(order) and len(set(order)) == 8
    phone = rows[order[5]]
    assert "5.74x" in phone and "3.49 [3.44, 3.55]" in phone and "352.0" in phone
    assert "2 green; unproved: tg128" in phone and f"package of phone-midrange: {folders[0]}" in text
    assert "n = 120" in text and "AMD EPYC" in text and "2 threads" in text


def test_a_partial_build_prints_blanks_and_what_is_missing(
    partial: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = Outcome(skipped=["generate"], failed={"evaluate/teacher": GateMissed("it [bold]broke[/]", "mend it")})
    text = printed(tables.build_table(partial, outcome, []), capsys)
    assert "evaluate/teacher (not built)" in text and "steps that need them" in text
    assert (
        "FAILED evaluate/teacher: it [bold]broke[/]" in text
        and "not run, because a step before failed: generate" in text
    )
    found = tables.build_json(partial, outcome, [])
    json.dumps(found, allow_nan=False)
    assert found["exit_code"] == 4 and found["failed"]["evaluate/teacher"]["hint"] == "mend it"


def test_the_report_prints_every_table(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(printed(table, capsys) for table in tables.report_tables(collect(session)))
    for title in (
        "gates and limits",
        "what each stage cost or brought",
        "holdout by function",
        "training",
        "quantization",
        "time per step",
    ):
        assert title in text
    assert "5 x Q6_K to Q8_0" in text and "set_alarm" in text and "filters: ended 1590 of 1600" in text
    assert "heal.lr, heal.epochs" in text


def test_a_narrow_terminal_folds_and_cuts_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    for table in tables.report_tables(collect(session)):
        tables.print_table(table)
    text = out.getvalue()
    assert "…" not in text.replace("[…]", "").replace("sha256", "")
    assert "352.0" in text


def test_every_gate_of_every_target(session: Session) -> None:
    lines = tables.gate_lines(session)
    assert [(target, line["name"], line["status"]) for target, line in lines] == [
        (target, name, status)
        for target in TARGETS
        for name, status in (("shrink", "green"), ("file_size", "green"), ("tg128", "unproved"))
    ]


def test_explain_says_what_a_step_is_made_of(
    session: Session, partial: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tables.explain_json(session, session.plan.match("distill/1"))
    json.dumps(found, allow_nan=False)
    assert found[0]["status"] == "cached" and set(found[0]["inputs"]) == {"heal", "filter", "score"}
    assert "merge" in found[0]["used_by"] and found[0]["fields"]["loss"]["kd"] == 0.7
    tables.print_explain(found)
    text = capsys.readouterr().out
    assert "loss.kd = 0.7" in text and "train.steps = 110" in text and found[0]["key"] in text
    missing = tables.explain_json(partial, partial.plan.match("package/phone-midrange"))
    assert missing[0]["entry"] is None and missing[0]["status"] == "run"
    tables.print_explain(missing)
    assert "takes    about" in capsys.readouterr().out


@dataclass
class Made:
    name: str
    type: str
    path: Path
    size: int
    bpw: float
    fallbacks: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def test_quantized_files_say_what_fell_back(capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(
        "laptop [x]",
        "Q4_K_M",
        Path("out/model.gguf"),
        61 * 2**20,
        6.17,
        [f"blk.{n}: Q6_K -> Q8_0" for n in range(9)],
        ["checked"],
    )
    text = printed(tables.quantize_table([made]), capsys)
    assert "laptop [x]" in text and "61 MiB" in text and "6.17" in text
    assert "9 tensors fell back to other types" in text and "and 5 more" in text and "checked" in text
    one = Made("phone", "Q4_K_M", Path("out/model.gguf"), 9, 4.9, ["blk.0: Q6_K -> Q8_0"], [])
    assert "phone: 1 tensor fell back to another type: blk.0" in printed(tables.quantize_table([one]), capsys)


def test_targets_store_and_doctor(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    from edgedistill.gc import list_store

    text = printed(tables.targets_table(list_targets()), capsys)
    assert "phone-midrange" in text and "aarch64" in text
    entries = list_store(Store(session.store.root))
    text = printed(tables.store_table(entries), capsys)
    assert f"{len(entries)} entries" in text and entries[0]["key"][:12] in text
    check = type(
        "Check",
        (),
        {"name": "llama.cpp", "ok": False, "detail": "not installed", "remedy": "pip install llama-cpp-python"},
    )
    text = printed(tables.doctor_table([check]), capsys)
    assert "MISSING" in text and "pip install llama-cpp-python" in text


@pytest.mark.parametrize(
    "seconds, text", [(None, ""), (0.42, "0.4 s"), (35, "35 s"), (245, "4:05 min"), (4205, "1:10:05 h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


def test_importing_tables_imports_nothing_heavy() -> None:
    code = "import edgedistill.tables, sys; print(sorted({'torch', 'numpy', 'rich', 'llama_cpp'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
