"""Lines of JSONL files end with a line feed, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edgedistill.jsonl import json_lines


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\r"))))
def test_any_text_comes_back(tmp_path_factory: object, texts: list[str]) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.jsonl"  # type: ignore[attr-defined]
    path.write_text(
        "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8", newline="\n"
    )
    assert [json.loads(line) for line in json_lines(path)] == texts
