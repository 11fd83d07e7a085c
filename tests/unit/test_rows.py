"""The row store: what is deleted from it is the answers, and not what they did cost."""

from __future__ import annotations

from pathlib import Path

from edgedistill.rows import Answered, Question, RowStore
from edgedistill.spending import Budget, Use
from edgedistill.teachers.batch_book import Book


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_answers_that_are_deleted_were_still_paid_for(tmp_path: Path) -> None:
    """``teacher.budget`` bounds all builds of a recipe on a store, and a batch that is under way is not sent again."""
    store, book = RowStore(tmp_path), Book(tmp_path / "rows.sqlite", "a", Budget(tokens=1000))
    assert store.delete_all() == 0
    question = Question(teacher="t", messages=(("user", "x"),), sampling=(), seed=0)
    store.asking([question])
    store.add([(question, Answered(key=question.key, text="y" * 100_000, token_ids=(), finish="stop", logprob=0.0))])
    assert book.reserve(Use(600, 0))
    batch = book.open("http://x", {"r1": Use(100, 10)})
    before = size(tmp_path)
    book.close()
    assert store.delete_all() == 1
    assert store.counts() == {"rows": 0, "asks": 0} and store.get([question.key]) == {}
    assert book.spent().tokens == 710 and not book.reserve(Use(600, 0))
    assert book.under_way("http://x") == [batch]
    assert size(tmp_path) < before - 90_000
    book.close()
