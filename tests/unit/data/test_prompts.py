"""Rows from JSONL: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.data.prompts import Row, leaks, load_rows, parse_row, rows_digest, with_shots
from edgedistill.errors import UsageError


def user(text: str, **more: Any) -> Row:
    return Row(id=more.pop("id", text), messages=({"role": "user", "content": text},), **more)


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_reads_every_field(tmp_path: Path) -> None:
    line = {
        "id": "a",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "reference": "Hello",
        "tags": ["greeting"],
        "tools": [{"type": "function"}],
        "split": "train",
        "seed_id": "s",
        "source": "a column of one's own",
    }
    (row,) = load_rows(write(tmp_path, line))
    assert row.messages[1] == {"role": "user", "content": "Hi"}
    assert row.to_json() == {key: value for key, value in line.items() if key != "source"}
    assert parse_row(row.to_json(), "x:1") == row


def test_a_prompt_is_one_user_message_and_ids_may_be_left_out(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, {"prompt": "one"}, "", {"prompt": "two", "id": 7}))
    assert rows[0].messages == ({"role": "user", "content": "one"},)
    assert rows[1].id == "7"
    again = load_rows(write(tmp_path, {"prompt": "zero"}, {"prompt": "one"}))
    assert again[1].id == rows[0].id  # an id from the content does not change when lines move


def test_a_byte_order_mark_windows_lines_and_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x\xe2\x80\xa8y"}\r\n{"id": "b", "prompt": "z"}\r\n')
    assert [row.id for row in load_rows(path)] == ["a", "b"]


GOOD = {"id": "a", "prompt": "x"}
LAST = {"role": "user", "content": "y"}


@pytest.mark.parametrize(
    ("lines", "line", "message", "hint"),
    [
        (["{'id': 1}"], 1, "malformed JSON, column 2", "one complete JSON object"),
        ([GOOD, '{"id": "b", "prompt": "y"},'], 2, "malformed JSON", "without a comma"),
        (["[", json.dumps(GOOD), "]"], 1, "malformed JSON", "jq -c"),
        (["[1]"], 1, "not a list", "Write"),
        ([{"id": "a"}], 1, "no messages", "prompt"),
        ([{"id": "a", "messages": []}], 1, "no messages", "prompt"),
        ([{"id": "a", "messages": ["x"]}], 1, "must be an object", "role"),
        ([{"id": "a", "messages": [{"role": "User", "content": "x"}]}], 1, "wrong role 'User'", "Did you mean 'user'"),
        ([{"id": "a", "messages": [{"content": "x"}]}], 1, "wrong role None", "system, user"),
        ([{"id": "a", "messages": [{"role": "user", "content": ["x"]}]}], 1, "content must be a string", "Only text"),
        ([{"id": "a", "messages": [{"role": "user", "text": "x"}]}], 1, "unknown field 'text'", "A message has"),
        ([{"id": "a", "prompt": "x", "messages": []}], 1, "both prompt and messages", "Keep one"),
        ([{"id": "a", "prompt": " "}], 1, "prompt must be a string", "Write"),
        ([{"id": "a", "prompt": "x", "refrence": "y"}], 1, "unknown field 'refrence'", "Did you mean 'reference'"),
        (
            [{"id": "a", "prompt": "x", "reference": {"a": 1}}],
            1,
            "reference must be a string, not an object",
            "as a string",
        ),
        ([{"id": "a", "prompt": "x", "tags": "t"}], 1, "tags must be a list", '"tags"'),
        ([{"id": "a", "prompt": "x", "tools": [1]}], 1, "tools must be a list", '"tools"'),
        ([{"id": "a", "prompt": "x", "split": 3}], 1, "split must be a string", '"split"'),
        ([{"id": "", "prompt": "x"}], 1, "id must be a string", "short unique id"),
        ([GOOD, "", GOOD], 3, "id 'a' was used before, on line 1", "rename one"),
        ([{"conversations": [{"from": ["human"], "value": "x"}]}], 1, "wrong speaker ['human']", "A turn is from"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": "x"},
                        {"role": "assistant", "content": "", "tool_calls": "f"},
                        LAST,
                    ]
                }
            ],
            1,
            "messages[1]: tool_calls must be a list of JSON objects",
            '"function"',
        ),
        ([{"id": "a", "prompt": "x", "tools": [{"least": float("nan")}]}], 1, "what is no JSON: ", "Take it out"),
    ],
)
def test_a_wrong_line_is_named_with_a_remedy(
    tmp_path: Path, lines: list[Any], line: int, message: str, hint: str
) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(UsageError) as caught:
        load_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_order_of_messages(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "y", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(UsageError, match="nothing to answer"):
        load_rows(write(tmp_path, {"messages": [{"role": "user", "content": "x"}, call]}))
    late = [{"role": "user", "content": "x"}, {"role": "system", "content": "s"}]
    with pytest.raises(UsageError, match="must come first"):
        load_rows(write(tmp_path, {"messages": late}))
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "42"}
    (row,) = load_rows(write(tmp_path, {"messages": [{"role": "user", "content": "x"}, calls, tool]}))
    assert len(row.messages) == 3


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "x \ud83d"},
        {"messages": [{"role": "system", "content": "\ude00"}, {"role": "user", "content": "x"}]},
        {"prompt": "x", "reference": "\ud83d y"},
        {"prompt": "x", "guidance": "\ud83d"},
        {"prompt": "x", "tags": ["\ud83d"]},
        {"prompt": "x", "id": "\ud83d"},
        {"prompt": "x", "tools": [{"type": "function", "function": {"name": "\ud83d"}}]},
    ],
)
def test_half_a_surrogate_pair_is_refused_before_anybody_is_asked(tmp_path: Path, more: dict[str, Any]) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "whole: \U0001f600"}, {"id": "b", **more})
    with pytest.raises(UsageError, match=r"rows\.jsonl:2: row '.*' holds half of a character") as error:
        load_rows(path)
    assert "U+FFFD" in error.value.hint


def test_missing_empty_and_other_files(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(UsageError, match="no such file") as caught:
        load_rows(tmp_path / "row.jsonl")
    assert "Did you mean" in caught.value.hint
    with pytest.raises(UsageError, match="no such file") as caught:
        load_rows(tmp_path / "data" / "row.jsonl")
    assert "does not exist either" in caught.value.hint
    with pytest.raises(UsageError, match="is a folder"):
        load_rows(tmp_path)
    with pytest.raises(UsageError, match="no rows"):
        load_rows(write(tmp_path, "", "  "))
    (tmp_path / "latin.jsonl").write_bytes('{"id": "a", "prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.jsonl:1: not UTF-8"):
        load_rows(tmp_path / "latin.jsonl")
    (tmp_path / "deep.jsonl").write_text('{"a":' * 100_000)
    with pytest.raises(UsageError, match=r"deep.jsonl:1"):
        load_rows(tmp_path / "deep.jsonl")


def test_references_can_be_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "x", "reference": "y"}, {"id": "b", "prompt": "z"})
    assert len(load_rows(path)) == 2
    with pytest.raises(UsageError, match=r"rows.jsonl:2: row 'b' has no reference"):
        load_rows(path, need_reference=True)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}))
    spaced = load_rows(
        write(tmp_path, '{ "prompt":"x",   "id":"a"}', '{"messages":[{"content":"y","role":"user"}],"id":"b"}')
    )
    assert rows_digest(rows) == rows_digest(spaced)
    assert rows_digest(rows) != rows_digest(rows[::-1])  # which rows come first decides what is calibrated on
    assert rows_digest(rows) != rows_digest([rows[0], user("y!", id="b")])
    rows_digest([user("\ud83d", id="half a surrogate pair")])


@given(st.lists(st.text(max_size=8), max_size=4, unique=True), st.text(max_size=8))
def test_no_two_texts_share_a_digest(texts: list[str], other: str) -> None:
    rows = [user(text, id=str(i)) for i, text in enumerate(texts)]
    assert (rows_digest(rows) == rows_digest([*rows, user(other, id="x")])) is False


def test_leaks_between_files() -> None:
    train = [user("Set an alarm"), user("set  an ALARM", id="again")]
    holdout = [user("set an alarm ", id="h1"), user("something else", id="h2")]
    ood = [user("Something  else", id="o1")]
    found = leaks(train, {"holdout": holdout, "ood": ood})
    assert [(leak.first, leak.second) for leak in found] == [
        (("train", "Set an alarm"), ("holdout", "h1")),
        (("holdout", "h2"), ("ood", "o1")),
    ]
    system = Row(id="s", messages=({"role": "system", "content": "x"}, {"role": "user", "content": "Set an alarm"}))
    assert leaks(train, {"holdout": [system]})  # another system message does not make another prompt
    assert not leaks(train, {"holdout": [user("set an alert", id="h")]})


def test_shots_go_after_the_system_message() -> None:
    shots = [user("two", reference="2")]
    row = Row(id="r", messages=({"role": "system", "content": "Count."}, {"role": "user", "content": "three"}))
    (out,) = with_shots([row], shots)
    assert [(m["role"], m["content"]) for m in out.messages] == [
        ("system", "Count."),
        ("user", "two"),
        ("assistant", "2"),
        ("user", "three"),
    ]
    assert out.id == "r"
    with pytest.raises(UsageError, match="has no reference"):
        with_shots([row], [user("x")])


def test_reading_rows_needs_no_heavy_library() -> None:
    code = (
        "import sys, edgedistill.data.prompts, edgedistill.evals.metrics;"
        "print(sorted({'numpy', 'torch', 'transformers', 'llama_cpp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
