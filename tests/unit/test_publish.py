"""Finished packages beside the recipe: linked from the store, or told why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.errors import GateMissed, UsageError
from edgedistill.fingerprint import Key
from edgedistill.runner import Outcome
from edgedistill.session import publish
from tests.unit.made_build import make_session


def test_a_place_that_cannot_be_written_to_is_told_and_the_package_stays(tmp_path: Path) -> None:
    session = make_session(tmp_path, ship=["laptop-x86"])
    dist = session.path.parent / "dist"
    dist.write_text("in the way")
    with pytest.raises(
        UsageError, match=r"dist/quickstart/laptop-x86: cannot be written \(Not a directory\)"
    ) as caught:
        publish(session, Outcome())
    assert f"edgedistill build {session.path}" in caught.value.hint
    dist.unlink()
    (folder,) = publish(session, Outcome())
    assert folder == dist / "quickstart" / "laptop-x86" and any(folder.iterdir())


def test_a_package_whose_inputs_have_changed_since_is_not_handed_out(tmp_path: Path) -> None:
    session = make_session(tmp_path, ship=["laptop-x86"])
    package = session.store.load(session.plan.packages["laptop-x86"])
    assert package is not None and len(publish(session, Outcome())) == 1
    session.store.discard(Key(next(iter(package.inputs))))
    assert publish(session, Outcome(skipped=["package/laptop-x86"])) == []


def test_what_an_earlier_build_left_is_told(tmp_path: Path) -> None:
    session, notes = make_session(tmp_path, ship=["laptop-x86", "phone-midrange"]), list[str]()
    dist = session.path.parent / "dist" / "quickstart"
    for folder in publish(session, Outcome(), notes.append):
        (folder / "manifest.json").write_text("{}")
    assert notes == []  # the third target has no package, and never had
    missed = {"package/phone-midrange": GateMissed("quickstart/phone-midrange: speedup", "")}
    assert publish(session, Outcome(failed={**missed}), notes.append) == [dist / "laptop-x86"]
    told = f"{dist / 'phone-midrange'} is of an earlier build: this one missed a gate, and left it as it was"
    assert notes == [told] and (dist / "phone-midrange" / "manifest.json").is_file()
    session.store.discard(session.plan.packages["phone-midrange"])
    notes.clear()
    publish(session, Outcome(skipped=["package/phone-midrange"]), notes.append)
    assert [note.partition(": ")[2] for note in notes] == [
        "this one packaged nothing for this target, and left it as it was"
    ]
