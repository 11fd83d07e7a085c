"""Prove an ONNX folder: same tokens, close distributions and greedy text in the stock runtime as in transformers.

What is compared: the rendered chat template and its token ids (must be equal), greedy continuations through
onnxruntime-genai (fp32: equal but for ties), and the KL divergence of every position through plain onnxruntime.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.likelihood import kl_divergence
from edgedistill.evals.runners.gguf import log_softmax
from edgedistill.evals.runners.onnx import OnnxRunner

NEW_TOKENS = 24
# Mean KLD in nats a token above which a folder is another model. SmolLM2 measures 1e-9, 0.005 and 0.4; broken ones 3 and more.
LIMITS = {"fp32": 1e-4, "int8": 0.2, "int4": 2.0}


@dataclass(frozen=True, kw_only=True)
class OnnxHop:
    """Hold the comparison with transformers in float32. ``max_diff`` is in logit units, ``kld`` in nats a token.

    ``greedy_equal`` counts prompts whose greedy texts are equal; ``greedy_share`` is the mean share of tokens before the first
    difference.
    """

    precision: str
    prompts: int
    tokens: int
    max_diff: float
    kld: float
    kld_max: float
    top1: float
    greedy_equal: int
    greedy_share: float

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return asdict(self)


def precision_of(onnx_dir: Path) -> str:
    """Read from the graph how its matrices are stored: "fp32", "int8" or "int4" (the one that most of them have)."""
    import onnx

    try:
        name = json.loads((Path(onnx_dir) / "genai_config.json").read_text())["model"]["decoder"]["filename"]
        graph = onnx.load(str(Path(onnx_dir) / name), load_external_data=False).graph
    except Exception as error:  # a protobuf decoder raises types of its own
        raise UsageError(f"{onnx_dir}: no readable ONNX model: {error}", "Build the ONNX folder again.") from None
    bits = [a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
    return f"int{max(set(bits), key=bits.count)}" if bits else "fp32"


def compare(model_dir: Path, onnx_dir: Path, prompts: Sequence[Sequence[dict[str, Any]]]) -> OnnxHop:
    """Load the folder in its stock runtime and compare it with ``model_dir`` on chat prompts (lists of messages).

    Raises StepFailed where it does not load, cuts text into other tokens, or its distributions are further from transformers'
    than its precision explains; UsageError without prompts.
    """
    import torch
    import transformers

    if not prompts:
        raise UsageError("an ONNX folder is proved on prompts, and there are none", "Add rows to [prompts].")
    precision = precision_of(onnx_dir)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(model_dir), dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()
    diffs: list[float] = []
    klds: list[np.ndarray] = []
    agree: list[np.ndarray] = []
    shares: list[float] = []
    with OnnxRunner(Path(onnx_dir)) as runner:
        for number, messages in enumerate(prompts, start=1):
            text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            prompt = list(tokenizer.encode(text, add_special_tokens=False))
            _same_tokens(runner, messages, text, prompt, number)
            with torch.inference_mode():
                ids = torch.tensor([prompt])
                greedy = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    repetition_penalty=1.0,
                    pad_token_id=model.generation_config.eos_token_id
                    if isinstance(model.generation_config.eos_token_id, int)
                    else tokenizer.eos_token_id,
                )[0].tolist()
                wanted = model(torch.tensor([greedy])).logits[0].numpy()
            found = runner.logits(greedy)
            size = min(wanted.shape[1], found.shape[1], len(tokenizer))
            if not np.all(np.isfinite(found)):
                raise StepFailed(
                    f"{onnx_dir}: prompt {number}: the logits are not finite", "Build another type: int8, or fp32."
                )
            diffs.append(float(np.abs(wanted[:, :size] - found[:, :size]).max()))
            kld, same = kl_divergence(log_softmax(wanted[:, :size]), log_softmax(found[:, :size]))
            klds.append(kld)
            agree.append(same)
            expected = greedy[len(prompt) :]
            made = runner.generate([prompt], NEW_TOKENS)[0][: len(expected)]
            first = next((i for i, (a, b) in enumerate(zip(expected, made, strict=False)) if a != b), len(made))
            shares.append(first / max(1, len(expected)))
            if precision == "fp32" and first < len(expected):
                _tie(wanted[len(prompt) + first - 1], made[first], diffs[-1], onnx_dir, number)
    every = np.concatenate(klds)
    hop = OnnxHop(
        precision=precision,
        prompts=len(prompts),
        tokens=int(every.size),
        max_diff=max(diffs),
        kld=float(every.mean()),
        kld_max=float(every.max()),
        top1=float(np.concatenate(agree).mean()),
        greedy_equal=sum(share == 1.0 for share in shares),
        greedy_share=float(np.mean(shares)),
    )
    if hop.kld > LIMITS[precision]:
        raise StepFailed(
            f"{onnx_dir}: {precision} is {hop.kld:.3g} nats a token away from transformers (n = {hop.tokens} tokens), more than "
            f"its rounding explains ({LIMITS[precision]:g}): this is another model",
            "Build another type (int8, fp32); if that passes, the builder's quantizer is at fault.",
        )
    return hop


def _same_tokens(
    runner: OnnxRunner, messages: Sequence[dict[str, Any]], text: str, prompt: list[int], number: int
) -> None:
    rendered = runner.render(messages)
    if rendered != text:
        raise StepFailed(
            f"prompt {number}: onnxruntime-genai renders the chat template as {rendered[-80:]!r}, transformers as {text[-80:]!r}",
            "Simplify chat_template.jinja: this runtime knows a part of jinja2.",
        )
    ids = runner.encode_text(text)
    if ids != prompt:
        at = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
        raise StepFailed(
            f"prompt {number}: onnxruntime-genai cuts the text into other tokens than transformers, from token {at} on",
            "The tokenizer does not fit this runtime: ship GGUF for it.",
        )


def _tie(logits: np.ndarray, token: int, difference: float, onnx_dir: Path, number: int) -> None:
    """Accept another greedy token only where the reference holds the two for equal within the difference of the logits."""
    gap = float(logits.max() - logits[token])
    if gap > 2 * difference:
        raise StepFailed(
            f"{onnx_dir}: prompt {number}: greedy texts part at a token that transformers holds {gap:.3g} logits behind, and the "
            f"logits differ by {difference:.3g} only: the runtime and the plain session disagree",
            "Report it to onnxruntime-genai with this folder.",
        )
