"""What .ci/run lets pass: no test that is marked as gating is left to a phase that only notes what failed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / ".ci" / "run").read_text()


def test_gating_tests_have_a_phase_that_can_fail() -> None:
    phases = re.findall(r"^phase (\S+) (.*)$", SCRIPT, re.MULTILINE)
    (advisory,) = re.findall(r'^advisory="(.*)"$', SCRIPT, re.MULTILINE)
    names = [name for name, _ in phases]
    assert set(advisory.split()) <= set(names)
    assert dict(phases)["gating"].endswith("scripts/test -m gating --durations 5")
    assert "gating" not in advisory.split()
    # what fills the time that is left comes after what must pass, and does not run it again
    assert names.index("gating") < min(names.index(name) for name in advisory.split())
    assert 'scripts/test -m "slow and not gating"' in SCRIPT
    assert "EDGEDISTILL_REQUIRE_ALL=1" in SCRIPT


def test_gating_tests_are_slow_ones() -> None:
    """Else they would run twice."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gating\n" in path.read_text()]
    assert {path.name for path in marked} - {Path(__file__).name} >= {"test_dockerfile.py", "test_kill.py"}
    for path in marked:
        for marks in re.findall(r"((?:^@pytest\.mark\..*\n)+)def ", path.read_text(), re.MULTILINE):
            assert "mark.gating" not in marks or "mark.slow" in marks, path
