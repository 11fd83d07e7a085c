"""What was packaged by --ship-anyway is found by who does not give the flag: the report tells of it, and gc keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgedistill.cli import app
from edgedistill.expand import expand
from edgedistill.report import collect
from edgedistill.report_html import page
from edgedistill.report_sheets import models_sheet
from edgedistill.session import Session
from tests.unit.made_build import TARGETS, make_session


def unflagged(session: Session) -> Session:
    inputs = replace(session.inputs, ship_anyway=False)
    return replace(session, inputs=inputs, plan=expand(inputs))


def test_the_report_finds_it_and_says_that_a_gate_was_missed(tmp_path: Path) -> None:
    built = make_session(tmp_path, ship=["phone-midrange"], ship_anyway=True)
    plain = unflagged(built)
    assert plain.plan.packages["phone-midrange"] != built.plan.packages["phone-midrange"]
    data = collect(plain)
    assert data.shipped == {name: name == "phone-midrange" for name in TARGETS}
    assert not any("phone-midrange" in line for line in data.missing)
    assert data.shipped_anyway == {"phone-midrange": ["speedup"]}
    told = "phone-midrange is packaged by --ship-anyway though it misses speedup"
    assert told in models_sheet(data).notes
    html = page(data)
    assert "1 of 3 artifacts packaged, 1 by --ship-anyway. " in html and "packaged though a gate is missed" in html
    # What it was made of has changed since: there is no such package any more.
    built.store.discard(plain.plan.match("tune/phone-midrange")[0].key)
    data = collect(plain)
    assert not any(data.shipped.values()) and not data.shipped_anyway


def test_a_package_that_missed_nothing_is_told_as_before(tmp_path: Path) -> None:
    data = collect(make_session(tmp_path, ship=TARGETS))
    assert data.shipped_anyway == {} and not any("--ship-anyway" in note for note in models_sheet(data).notes)
    assert "3 of 3 artifacts packaged. " in page(data)


def test_gc_keeps_it_for_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = make_session(tmp_path, ship=["phone-midrange"], ship_anyway=True)
    plain = unflagged(built)
    monkeypatch.setenv("EDGEDISTILL_STORE", str(built.store.root))
    monkeypatch.setattr("edgedistill.sweep.sessions_of", lambda path, store: [plain])
    done = CliRunner().invoke(app, ["store", "gc", "--keep", str(built.path)])
    assert done.exit_code == 0 and done.stdout.startswith("0 entries, "), done.output
    assert built.store.load(built.plan.packages["phone-midrange"]) is not None
    done = CliRunner().invoke(app, ["store", "gc", "--all"])
    assert done.exit_code == 0 and built.store.load(built.plan.packages["phone-midrange"]) is None
