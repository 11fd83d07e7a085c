"""Other norms are put into a quantized file in place, and the file computes with them what transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import StepFailed
from edgedistill.formats.gguf.dequantize import gguf_to_hf, hf_tensor_name
from edgedistill.formats.gguf.model_io import all_logits, open_model
from edgedistill.formats.gguf.norms import replace_norms
from edgedistill.formats.gguf.quantize import quantize
from edgedistill.formats.gguf.read import read_info, read_tensor

Tiny = Callable[..., Path]
IDS = list(range(3, 40))


def gains(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    info = read_info(path)
    names = [tensor.name for tensor in info.tensors if "norm" in tensor.name]
    return {
        hf_tensor_name(name) or "": read_tensor(info, name) * rng.uniform(0.5, 1.5, read_tensor(info, name).shape)
        for name in names
    }


def test_the_file_computes_with_them_and_nothing_else_moved(tiny_gguf: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path / "q.gguf"
    quantize(tiny_gguf(), path, "Q4_0")
    before, info = path.read_bytes(), read_info(path)
    norms = gains(path)
    assert replace_norms(path, norms) == len(norms) == 5
    assert read_info(path).tensors == info.tensors and len(path.read_bytes()) == len(before)
    for tensor in info.tensors:
        part = slice(tensor.offset, tensor.offset + tensor.nbytes)
        assert (path.read_bytes()[part] == before[part]) == ("norm" not in tensor.name)
        if "norm" in tensor.name:
            want = norms[hf_tensor_name(tensor.name) or ""]
            np.testing.assert_array_equal(read_tensor(read_info(path), tensor.name), want.astype(np.float32))
    gguf_to_hf(path, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        want = model(torch.tensor([IDS])).logits[0].numpy()
    got = all_logits(open_model(path, n_ctx=64), IDS)
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).max()  # llama.cpp rounds the inputs of 4-bit products


@pytest.mark.parametrize("wrong", ["model.layers.9.input_layernorm.weight", "model.embed_tokens.weight"])
def test_what_does_not_fit_is_refused_and_nothing_written(wrong: str, tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "q.gguf"
    quantize(tiny_gguf(), path, "Q4_0")
    before = path.read_bytes()
    with pytest.raises(StepFailed, match="no place for"):
        replace_norms(path, {**gains(path), wrong: np.ones(64)})
    with pytest.raises(StepFailed, match=r"no place for .* of shape \(3,\)"):
        replace_norms(path, {"model.norm.weight": np.ones(3)})
    assert path.read_bytes() == before
