"""The importance matrix is the mean squared input of every matrix, as computed independently with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import UsageError
from edgedistill.formats.gguf import activations
from edgedistill.formats.gguf.dequantize import hf_tensor_name
from edgedistill.formats.gguf.imatrix import collect, load
from edgedistill.formats.gguf.read import read_info, read_tensor

Tiny = Callable[..., Path]


def rows(vocab: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def reference(folder: Path, token_rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Sum the squares of every linear layer's input, one row at a time, in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sums: dict[str, np.ndarray] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            squares = inputs[0][0].double().square().sum(0).numpy()
            sums[name] = sums.get(name, 0) + squares

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(f"{name}.weight"))
    with torch.inference_mode():
        for row in token_rows:
            model(torch.tensor([row]))
    return {name: total / sum(map(len, token_rows)) for name, total in sums.items()}


@pytest.mark.parametrize("lengths", [(7, 1, 20, 33, 5), (200, 3, 150)], ids=["short", "long"])
def test_it_is_what_transformers_sees(
    lengths: tuple[int, ...], tiny: Tiny, tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "CHUNK", 64)  # several batches, rows longer than one, rows sharing one
    path = tiny_gguf(to="f32")
    token_rows = rows(read_info(path).vocab, lengths)
    seen: list[int] = []
    report = collect(
        path, token_rows, tmp_path / "i.gguf", threads=2, progress=lambda done, total, note: seen.append(done)
    )
    assert (report.tensors, report.matrices) == (14, 14) and report.tokens == sum(lengths) == seen[-1]
    got, want = load(tmp_path / "i.gguf"), reference(tiny(), token_rows)
    assert len(got) == 14
    for name, values in got.items():
        np.testing.assert_allclose(values, want[hf_tensor_name(name) or ""], rtol=2e-2, atol=1e-5)


def test_the_file_has_llama_cpps_form(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf()
    collect(path, rows(read_info(path).vocab, (10, 12)), tmp_path / "i.gguf", threads=1, dataset="mine")
    info = read_info(tmp_path / "i.gguf")
    assert info.metadata == {
        "general.type": "imatrix", "imatrix.datasets": ["mine"], "imatrix.chunk_count": 1, "imatrix.chunk_size": 512,
    }  # fmt: skip
    assert read_tensor(info, "blk.0.ffn_down.weight.counts").tolist() == [[22.0]]
    assert read_tensor(info, "blk.0.ffn_down.weight.in_sum2").shape == (1, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_the_bytes_do_not_depend_on_threads(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tiny_gguf()
    token_rows = rows(read_info(path).vocab, (40, 80, 9))
    for threads in (1, 2):
        collect(path, token_rows, tmp_path / f"{threads}.gguf", threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_bad_rows_are_refused(tiny_gguf: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibration set is empty"):
        collect(tiny_gguf(), [[], []], tmp_path / "i.gguf")
    with pytest.raises(UsageError, match="token 99999 is outside"):
        collect(tiny_gguf(), [[1, 99999]], tmp_path / "i.gguf")


def test_other_files_are_no_imatrix(tiny_gguf: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an importance matrix"):
        load(tiny_gguf())
    (tmp_path / "old.dat").write_bytes(b"\x03\x00\x00\x00 legacy")
    with pytest.raises(UsageError, match="not a GGUF"):
        load(tmp_path / "old.dat")


def test_all_matrices_of_the_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    report = collect(smollm2_gguf, rows(49152, (30, 40)), tmp_path / "i.gguf", threads=2)
    assert (report.tensors, report.matrices) == (210, 210)  # 207 where only the last token's logits are asked
