"""Models open quietly, failures come in words, and logits are the same however they are batched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import UsageError
from edgedistill.formats.gguf.model_io import all_logits, greedy, last_log, library_build, open_model

Tiny = Callable[..., Path]


def test_opening_is_silent_and_keeps_the_log(tiny_gguf: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    open_model(tiny_gguf(), n_ctx=32).close()
    assert capfd.readouterr() == ("", "") and "llama" in last_log()


def test_logits_do_not_depend_on_the_batch(tiny_gguf: Tiny) -> None:
    ids = list(range(3, 63))
    rows = []
    for n_batch in (64, 32, 7):
        model = open_model(tiny_gguf(), n_ctx=64, n_batch=n_batch, threads=1)
        rows.append(all_logits(model, ids))
        np.testing.assert_array_equal(all_logits(model, ids, start=50), rows[-1][50:])
        model.close()
    assert rows[0].shape == (60, rows[0].shape[1])
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], atol=0.02)


def test_greedy_follows_the_logits(tiny_gguf: Tiny) -> None:
    model = open_model(tiny_gguf(), n_ctx=64, threads=1)
    ids = [5, 9, 20]
    made = greedy(model, ids, 8)
    best = all_logits(model, ids + made)[len(ids) - 1 : -1].argmax(-1).tolist()
    assert made == best and greedy(model, ids, 8) == made
    model.close()


def test_too_many_tokens_are_refused(tiny_gguf: Tiny) -> None:
    model = open_model(tiny_gguf(), n_ctx=32)
    with pytest.raises(UsageError, match="do not fit the context"):
        all_logits(model, [5] * (model.n_ctx() + 1))
    model.close()


def test_a_file_that_llama_cpp_refuses_is_told(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_gguf(), tmp_path / "x.gguf"))
    path.write_bytes(path.read_bytes().replace(b"smollm", b"smullm", 1))
    with pytest.raises(UsageError, match="unknown pre-tokenizer type: 'smullm'"):
        open_model(path)
    with pytest.raises(UsageError, match="no such GGUF"):
        open_model(tmp_path / "none.gguf")


def test_the_build_is_identified() -> None:
    build = library_build()
    assert build["llama_cpp_python"].startswith("0.3.") and len(build["library_sha256"]) == 64
    assert build["features"] and library_build() is build
