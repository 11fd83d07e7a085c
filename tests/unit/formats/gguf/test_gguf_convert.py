"""Our converter against transformers on tiny models of each family, and against upstream's on the real one."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf import convert as module
from edgedistill.formats.gguf.check import compare_logits, compare_tokens
from edgedistill.formats.gguf.checkpoint import open_checkpoint, read_entry
from edgedistill.formats.gguf.convert import PROBES, convert
from edgedistill.formats.gguf.read import read_info, read_tensor
from edgedistill.formats.gguf.types import estimate_file_size

Tiny = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# What can go wrong differs per kind: tied and untied heads, grouped and single kv heads, biases, RoPE in all its forms,
# head sizes that are no quotient, source types, splitters and BOS.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "wide-heads": {"head_dim": 32, "pre": "gpt-2"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3, "pre": "llama-bpe", "bos": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "bf16": {"dtype": "bfloat16", "hidden_size": 256, "num_attention_heads": 8},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2", "pre": "qwen2"},
}


def long_prompts() -> list[str]:
    return ["".join(PROBES)[:150], "Set an alarm for 7:45 tomorrow"]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_does(kind: str, tiny: Tiny, tiny_gguf: Tiny) -> None:
    options = KINDS[kind]
    texts = [unicodedata.normalize("NFC", text) for text in PROBES]  # as Qwen2's tokenizer does, and llama.cpp does not
    report = compare_logits(tiny(**options), tiny_gguf(**options), long_prompts(), texts=texts)
    assert report.top1 > 0.97 and report.kld < 1e-4 and report.mean_diff < 0.003 * report.spread
    assert report.texts.tokens > 500


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_other_dtypes(dtype: str, tiny: Tiny, tiny_gguf: Tiny) -> None:
    options = KINDS["bf16"]  # bfloat16 weights are exact in both
    info = read_info(tiny_gguf(to=dtype, **options))
    assert info.file_type == dtype.upper()
    want = read_entry(open_checkpoint(tiny(**options))["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(read_tensor(info, "blk.1.ffn_down.weight"), want)
    assert compare_logits(tiny(**options), info.path, long_prompts()).top1 > 0.97


def test_a_forgotten_permutation_is_caught(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "permute", lambda weights, heads: weights)
    convert(tiny(), tmp_path / "bad.gguf")
    with pytest.raises(StepFailed, match="logits differ"):
        compare_logits(tiny(), tmp_path / "bad.gguf", long_prompts(), greedy=0)


def test_forgotten_llama3_factors_are_caught(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rope_tables", lambda config: {})
    options = KINDS["llama3"]
    convert(tiny(**options), tmp_path / "bad.gguf")
    with pytest.raises(StepFailed, match="logits differ"):
        compare_logits(tiny(**options), tmp_path / "bad.gguf", long_prompts(), greedy=0)


def test_the_report_and_the_file(tiny: Tiny, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = convert(
        tiny(), tmp_path / "a.gguf", name="Tiny", license="apache-2.0", progress=lambda *step: seen.append(step)
    )
    info = read_info(report.path)
    assert (info.name, info.license, report.size, report.tensors) == (
        "Tiny",
        "apache-2.0",
        info.size,
        len(info.tensors),
    )
    assert report.parameters == info.parameters and seen[-1][0] == seen[-1][1] == len(info.tensors)
    assert report.echo["pre"] == "smollm" and report.echo["special_ids"]["eos"] == 2 and not report.echo["add_bos"]
    assert json.loads(json.dumps(report.to_json()))["sha256"] == report.sha256
    again = convert(tiny(), tmp_path / "b.gguf", name="Tiny", license="apache-2.0")
    assert again.sha256 == report.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    config = json.loads((tiny() / "config.json").read_text())
    data = sum(-(-tensor.nbytes // 32) * 32 for tensor in info.tensors)
    assert 0 < estimate_file_size(config, None, "F16") - data < 30_000


def test_the_missing_normalizer_is_told(tiny: Tiny, tmp_path: Path) -> None:
    report = convert(tiny(**KINDS["qwen2"]), tmp_path / "a.gguf")
    assert "NFC" in report.notes[0]
    with pytest.raises(StepFailed, match=r"llama\.cpp tokenizes"):
        compare_tokens(tiny(**KINDS["qwen2"]), report.path, ["cafe\u0301"])


def test_bos_is_added_only_where_the_tokenizer_does(tiny_gguf: Tiny) -> None:
    assert read_info(tiny_gguf()).metadata["tokenizer.ggml.add_bos_token"] is False
    assert read_info(tiny_gguf(**KINDS["llama3"])).metadata["tokenizer.ggml.add_bos_token"] is True


def test_a_padded_vocabulary_is_filled_with_unused_tokens(tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny(), tmp_path / "padded")
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = model.config.vocab_size
    with torch.no_grad():
        model.resize_token_embeddings(size + 24, mean_resizing=False)
    model.save_pretrained(folder)
    info = read_info(convert(folder, tmp_path / "padded.gguf").path)
    assert info.vocab == size + 24 and info.metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{size + 23}]"
    assert info.metadata["tokenizer.ggml.token_type"][-24:] == [5] * 24
    assert compare_logits(folder, info.path, long_prompts()).kld < 1e-4


def test_shards_are_joined(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny(), tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny()).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole, parts = convert(tiny(), tmp_path / "a.gguf", name="t"), convert(folder, tmp_path / "b.gguf", name="t")
    assert whole.sha256 == parts.sha256
    next(folder.glob("*00002-of*.safetensors")).unlink()
    with pytest.raises(UsageError, match="shards are missing"):
        convert(folder, tmp_path / "c.gguf")


def test_a_sliding_window_limits_the_context(tiny: Tiny, tmp_path: Path) -> None:
    report = convert(tiny("mistral", sliding_window=64), tmp_path / "a.gguf")
    assert read_info(report.path).context_length == 64 and "sliding window of 64" in report.notes[0]


def broken(tiny: Tiny, tmp_path: Path, **changes: Any) -> Path:
    folder = shutil.copytree(tiny(), tmp_path / "broken")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BertModel"]}, "encoder"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["GemmaForCausalLM"]}, "supported: LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .gptq"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"num_hidden_layers": 1}, "has no place"),
        ({"vocab_size": 100}, "vocab_size is 100"),
        ({"intermediate_size": "many"}, "intermediate_size is 'many'"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"tie_word_embeddings": False}, "output.weight"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_words(
    changes: dict[str, Any], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(broken(tiny, tmp_path, **changes), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_a_pickle_checkpoint_is_refused_with_the_command_that_mends_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors only") as caught:
        convert(folder, tmp_path / "out.gguf")
    assert "save_pretrained" in caught.value.hint


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="LoRA adapter"):
        convert(tmp_path, tmp_path / "out.gguf")
    with pytest.raises(UsageError, match="no such model folder"):
        convert(tmp_path / "none", tmp_path / "out.gguf")


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_cut_safetensors_are_refused(keep: int, tiny: Tiny, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="cut short"):
        convert(folder, tmp_path / "out.gguf")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_safetensors_header_never_crashes(data: st.DataObject, tiny: Tiny, tmp_path: Path) -> None:
    whole = bytearray((tiny() / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, 8 + int.from_bytes(whole[:2], "little")))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(whole)
    try:
        for entry in open_checkpoint(tmp_path).values():
            read_entry(entry)
    except UsageError:
        pass


@pytest.mark.parametrize(("value", "words"), [(1e6, "over 65504"), (float("nan"), "NaN")])
def test_weights_that_f16_cannot_hold_are_refused(value: float, words: str, tiny: Tiny, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = broken(tiny, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match=words):
        convert(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_splitter_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    edit_tokenizer(folder, pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(UsageError, match="known ones: gpt-2"):
        convert(folder, tmp_path / "out.gguf")


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = broken(tiny, tmp_path)
    edit_tokenizer(folder, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    with pytest.raises(UsageError, match="a WordLevel tokenizer"):
        convert(folder, tmp_path / "out.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        convert(folder, tmp_path / "out.gguf")


def test_a_wrong_splitter_name_is_caught_by_the_token_ids(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedistill.formats.gguf import vocabulary

    monkeypatch.setattr(vocabulary, "find_pre", lambda data: "smollm")  # the folder's does not split digits
    with pytest.raises(StepFailed, match=r"llama.cpp tokenizes 'Set an alarm .* otherwise"):
        convert(tiny(**KINDS["wide-heads"]), tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow  # six seconds; test_gguf_upstream.py has every family
def test_the_real_model_against_the_upstream_converter(smollm2: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    theirs, ours = read_info(smollm2_gguf), read_info(convert(smollm2, tmp_path / "f16.gguf").path)
    # Names and licence come from a model card that the folder has not; file type and the redundant head size differ.
    free = {"general.file_type", "general.name", "general.basename", "general.finetune", "general.license",
            "general.languages", "general.organization", "general.size_label", "llama.attention.key_length",
            "llama.attention.value_length", "tokenizer.ggml.add_eos_token"}  # fmt: skip
    for key in (set(theirs.metadata) | set(ours.metadata)) - free:
        assert ours.metadata[key] == theirs.metadata[key], key
    assert {t.name: t.shape for t in ours.tensors} == {t.name: t.shape for t in theirs.tensors}
    for name in ("token_embd.weight", "blk.7.attn_q.weight", "blk.7.attn_k.weight", "blk.29.ffn_down.weight"):
        with np.errstate(under="ignore"):
            want = read_tensor(theirs, name).astype(np.float16)
        np.testing.assert_array_equal(read_tensor(ours, name).astype(np.float16), want)
    texts = [path.read_text()[:4000] for path in sorted(Path(module.__file__).parent.glob("*.py"))[:4]]
    assert compare_tokens(smollm2, ours.path, [*PROBES, *texts]).tokens > 5000
