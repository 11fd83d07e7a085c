"""Lines of JSONL files end with a line feed, and with nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edgedistill.jsonl import json_lines, whole


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\r"))))
def test_any_text_comes_back(tmp_path_factory: object, texts: list[str]) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.jsonl"  # type: ignore[attr-defined]
    path.write_text(
        "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8", newline="\n"
    )
    assert [json.loads(line) for line in json_lines(path)] == texts


@given(st.text(st.characters() | st.sampled_from("\ud83d\ude00")))
def test_what_is_made_whole_can_be_written_and_the_rest_of_it_stays(text: str) -> None:
    written = whole(text).encode().decode()
    assert len(written) == len(text)
    assert all(
        new == old or ("\ud800" <= old <= "\udfff" and new == "\ufffd") for new, old in zip(written, text, strict=True)
    )
