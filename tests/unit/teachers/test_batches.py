"""Prompts in batches, through a real HTTP server with files and batches: each is answered, stored and paid once."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.errors import StepFailed, UsageError
from edgedistill.served import Server
from edgedistill.spending import Budget, Spent, Use
from edgedistill.teachers.batch_book import Book
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.teachers.protocol import Sampling
from tests.batch_client import server, start
from tests.batch_server import BatchServer, wait_for
from tests.planned_server import USAGE

ROWS = 10
EACH = Use(USAGE["prompt_tokens"], USAGE["completion_tokens"])


class Asked:
    """One client: what it stored, noted and counted."""

    def __init__(self, folder: Path, asked: Server, rows: int = ROWS) -> None:
        self.folder, self.asked, self.rows = folder, asked, rows
        self.stored, self.notes, self.counts, self.put = dict[str, str](), list[str](), list[int](), list[int]()

    def run(self) -> Asked:
        prompts = [[{"role": "user", "content": f"Question {row}"}] for row in range(self.rows)]
        with OpenAITeacher(
            self.asked, rows=self.folder / "rows.sqlite", batched=True, note=self.notes.append
        ) as teacher:
            left = list(
                teacher.generate(
                    prompts,
                    sampling=Sampling(max_new_tokens=10),
                    row_ids=[f"r{row}" for row in range(self.rows)],
                    on_batch=lambda answers: self.stored.update({one.row_id: one.text for one in answers}),
                    on_ask=self.put.append,
                    progress=lambda done, total, text: self.counts.append(done),
                )
            )
        assert not left  # they were handed over as they arrived, and nobody has to hold them until the end
        return self

    @property
    def spent(self) -> Spent:
        return Book(self.folder / "rows.sqlite", "a", Budget()).spent()


def everything(rows: int = ROWS) -> dict[str, str]:
    return {f"r{row}": f"answer {row}" for row in range(rows)}


def test_each_prompt_is_answered_once_and_settled_at_the_price_of_batches(tmp_path: Path) -> None:
    with BatchServer(fate=lambda batch: "completed after 2") as there:
        found = Asked(tmp_path, server(there.url, requests=4, tokens=100_000, input=2.0, output=4.0)).run()
    assert found.stored == everything() and sorted(found.put) == list(range(ROWS))
    assert [batch["request_counts"]["total"] for batch in there.batches.values()] == [4, 4, 2]
    assert set(there.batched.values()) == {1} and not there.single
    assert found.spent.tokens == there.billed == ROWS * EACH.tokens
    assert found.spent.money == pytest.approx(ROWS * (EACH.prompt * 2.0 + EACH.completion * 4.0) / 2 / 1e6)
    assert found.counts[0] == ROWS  # all three were looked at, none had ended
    assert "batch_3 is under way with 2 requests" in found.notes[2]


def test_what_a_batch_leaves_goes_into_another_and_what_it_failed_at_is_asked_at_once(tmp_path: Path) -> None:
    deeds = {2: "500", 3: "expired", 4: "lost", 5: "odd", 6: "error"}
    with BatchServer(
        plan=lambda row, batch: deeds.get(row, "ok") if batch == 1 else "ok",
        fate=lambda batch: "expired" if batch == 1 else "completed",
    ) as there:
        found = Asked(tmp_path, server(there.url)).run()
    assert found.stored == everything()
    assert {row: count for row, count in there.batched.items() if count > 1} == {3: 2, 4: 2}
    assert dict(there.single) == {2: 1, 5: 1, 6: 1}
    # of the row that no line told of nobody knows what it cost
    assert there.billed < found.spent.tokens < there.billed + 300


def test_the_budget_bounds_what_is_under_way(tmp_path: Path) -> None:
    with BatchServer() as there:
        found = Asked(tmp_path, server(there.url, tokens=600), rows=30)
        with pytest.raises(StepFailed, match="of 600 tokens are spent, a request may take") as error:
            found.run()
        assert "raise teacher.budget" in error.value.hint
        sizes = [batch["request_counts"]["total"] for batch in there.batches.values()]
        assert len(sizes) > 1 and sizes[0] < 30  # settled, one batch left room for another
        assert 0 < len(found.stored) == sum(sizes) < 30
        assert there.billed == found.spent.tokens <= 600
        again = Asked(tmp_path, server(there.url, tokens=5))
        with pytest.raises(StepFailed, match=r"teacher\.budget"):
            again.run()
        assert len(there.batches) == len(sizes)


@pytest.mark.parametrize("absent", ["files", "batches"])
def test_a_server_without_batches_is_told_by_the_key(tmp_path: Path, absent: str) -> None:
    with BatchServer() as there:
        there.absent.add(absent)
        found = Asked(tmp_path, server(there.url, tokens=100_000))
        with pytest.raises(UsageError, match=rf"teacher\.batch: .* has no batches \(404 at /{absent}\)") as error:
            found.run()
    assert "take teacher.batch out" in error.value.hint
    assert found.spent.tokens == 0 and not there.batched


def test_a_batch_whose_creation_was_not_heard_of_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.teachers.batch_calls.FIRST_WAIT", 0.01)
    with BatchServer() as there:
        there.flaky = 3  # an upload, and both creating and asking for it again
        found = Asked(tmp_path, server(there.url)).run()
    assert found.stored == everything() and set(there.batched.values()) == {1}
    assert len(there.batches) == 1 < there.calls["list"] + there.calls["upload"]


def test_a_batch_that_the_server_creates_after_it_was_given_up_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.teachers.batch_calls.FIRST_WAIT", 0.01)
    with BatchServer() as there:
        there.slow = {"create": 1.5}
        found = Asked(tmp_path, server(there.url, timeout=0.5)).run()
    assert found.stored == everything() and set(there.batched.values()) == {1}
    assert there.calls["create"] == len(there.batches) == 1 and found.spent.tokens == there.billed


@pytest.mark.parametrize("step", ["upload", "create", "poll", "download"])
def test_a_batch_of_a_client_that_is_gone_is_found_again(tmp_path: Path, step: str) -> None:
    """Kills of real builds: tests/e2e/test_batched_teacher.py."""
    with BatchServer() as there:
        there.hang = step
        gone = start(tmp_path, there.url, range(ROWS), tokens=100_000)
        wait_for(there.hanging)
        gone.kill()
        gone.communicate()
        there.hang = ""
        if step == "create":  # somebody else's batches stand before it in the list
            for _ in range(5):
                name = there.upload_lines([])
                there.create({"input_file_id": name, "endpoint": "/v1/chat/completions", "completion_window": "24h"})
        again = Asked(tmp_path, server(there.url, tokens=100_000)).run()
        assert again.stored == everything()
        assert set(there.batched.values()) == {1} and not there.single
        assert there.calls["create"] == 1 and there.calls["upload"] == (2 if step == "upload" else 1)
        assert (there.calls["list"] == 3) == (step == "create")
    assert again.spent == Spent(requests=ROWS, prompt=ROWS * EACH.prompt, completion=ROWS * EACH.completion)
    assert any("since an earlier build" in note for note in again.notes) == (step != "upload")


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    fates = {1: "completed after 3", 2: "failed token_limit_exceeded"}
    with BatchServer(fate=lambda batch: fates.get(batch, "completed")) as there:
        found = Asked(tmp_path, server(there.url, requests=5)).run()
    assert found.stored == everything() and set(there.batched.values()) == {1}
    assert found.spent.tokens == there.billed


@pytest.mark.parametrize(
    ("fate", "deed", "told", "hint"),
    [
        ("failed token_limit_exceeded", "ok", "failed: too much", "teacher.batch.requests"),
        ("failed invalid_model", "ok", "failed: too much: invalid_model", "mend"),
        ("expired", "expired", "expired without an answer", "build again"),
        ("cancelled", "lost", "was cancelled", "build again"),
        ("cancelled", "cancelled", "was cancelled", "build again"),
    ],
)
def test_what_brings_nothing_fails(tmp_path: Path, fate: str, deed: str, told: str, hint: str) -> None:
    with BatchServer(plan=lambda row, batch: deed, fate=lambda batch: fate) as there:
        found = Asked(tmp_path, server(there.url))
        with pytest.raises(StepFailed, match=told) as error:
            found.run()
    assert hint in error.value.hint and len(there.batches) == 1 and not there.single
    assert (found.spent.tokens == 0) == (deed != "lost")


def test_what_a_cancelled_batch_did_not_begin_is_not_asked_at_once_for_the_whole_price(tmp_path: Path) -> None:
    with BatchServer(plan=lambda row, batch: "ok" if row < 4 else "cancelled", fate=lambda batch: "cancelled") as there:
        found = Asked(tmp_path, server(there.url))
        with pytest.raises(StepFailed, match="was cancelled"):
            found.run()
        assert not there.single and len(there.batches) == 1
        assert found.stored == everything(4) and found.spent.tokens == there.billed == 4 * EACH.tokens


def test_a_batch_that_the_server_has_forgotten_is_put_again(tmp_path: Path) -> None:
    book = Book(tmp_path / "rows.sqlite", "a", Budget())
    with BatchServer() as there:
        batch = book.open(there.url, {"r1": Use(100, 10)})
        assert batch is not None
        book.name(batch, file="file-x", id="batch_x")
        found = Asked(tmp_path, server(there.url)).run()
    assert found.stored == everything() and found.spent.tokens == there.billed + 110
    assert any("no such batch any more" in note for note in found.notes)


def test_a_batch_whose_answers_the_server_has_deleted_is_put_again_by_the_next_build(tmp_path: Path) -> None:
    """OpenAI keeps them for a month."""
    with BatchServer() as there:
        there.hang = "poll"
        gone = start(tmp_path, there.url, range(ROWS))
        wait_for(there.hanging)
        gone.kill()
        gone.communicate()
        there.hang = ""
        del there.files["output_file_id-1"]
        with pytest.raises(StepFailed, match="batch_1 ended without an answer") as error:
            Asked(tmp_path, server(there.url)).run()
        assert "build again" in error.value.hint
        again = Asked(tmp_path, server(there.url)).run()
    assert again.stored == everything() and again.spent.tokens > there.billed  # of the first nobody knows what it cost
