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
from edgedistill.evals.likelihood import LOST, kl_divergence, lost_kld
from edgedistill.evals.runners.gguf_session import log_softmax
from edgedistill.evals.runners.onnx import OnnxRunner

NEW_TOKENS = 24
# Mean KLD in nats a token above which a folder is another model; SmolLM2 measures 1e-7 and 0.005. What int4 costs
# depends on the model, and quality is for the recipe's gates: there only a model that has lost the text is refused.
LIMITS = {"fp32": 1e-4, "int8": 0.25}


@dataclass(frozen=True, kw_only=True)
class OnnxHop:
    """Hold the comparison with transformers in float32. ``max_diff`` is in logit units, ``kld`` in nats a token.

    ``greedy_equal`` counts prompts whose greedy texts are equal; ``greedy_share`` is the mean share of tokens before
    the first difference.
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

    Raises StepFailed where it does not load, cuts text into other tokens, or its distributions are further from
    transformers' than its precision explains; UsageError without prompts.
    """
    import torch

    from edgedistill.teachers.protocol import Sampling
    from edgedistill.teachers.transformers import TransformersTeacher

    if not prompts:
        raise UsageError("an ONNX folder is proved on prompts, and there are none", "Add rows to [prompts].")
    precision = precision_of(onnx_dir)
    # All of transformers first, then all of onnxruntime: their thread pools spin, and slow each other down by ten.
    teacher: Any = TransformersTeacher(Path(model_dir), "float32")
    size = teacher.vocab_size
    names = [str(number) for number in range(1, len(prompts) + 1)]
    texts = [
        teacher.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        for messages in prompts
    ]
    ids = [list(teacher.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
    answers = {a.index: list(a.token_ids) for a in teacher.generate(ids, sampling=sampling, row_ids=names)}
    wanted: list[np.ndarray] = []
    for i, prompt in enumerate(ids):
        with torch.inference_mode():
            wanted.append(teacher.model(torch.tensor([prompt + answers[i]])).logits[0, :, :size].float().numpy())
    del teacher

    diffs: list[float] = []
    klds: list[np.ndarray] = []
    agree: list[np.ndarray] = []
    shares: list[float] = []
    with OnnxRunner(Path(onnx_dir)) as runner:
        for i, (name, messages) in enumerate(zip(names, prompts, strict=True)):
            _same_tokens(runner, messages, texts[i], ids[i], name)
            found = runner.logits(ids[i] + answers[i])[:, :size]
            if not np.all(np.isfinite(found)):
                raise StepFailed(
                    f"{onnx_dir}: prompt {name}: the logits are not finite", "Build another type: int8, fp32."
                )
            diffs.append(float(np.abs(wanted[i] - found).max()))
            kld, same = kl_divergence(log_softmax(wanted[i]), log_softmax(found))
            klds.append(kld)
            agree.append(same)
            expected = answers[i]
            made = runner.generate([ids[i]], NEW_TOKENS)[0][: len(expected)]
            first = next((k for k, (a, b) in enumerate(zip(expected, made, strict=False)) if a != b), len(made))
            shares.append(first / len(expected) if expected else 1.0)
            if precision == "fp32" and first < len(made):
                _tie(wanted[i][len(ids[i]) + first - 1], made[first], diffs[-1], onnx_dir, name)
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
    limit = LIMITS[precision] if precision in LIMITS else LOST * lost_kld(log_softmax(np.concatenate(wanted)))
    if hop.kld > limit:
        raise StepFailed(
            f"{onnx_dir}: {precision} is {hop.kld:.3g} nats a token away from transformers (n = {hop.tokens} tokens, "
            f"limit {limit:.3g}): this is another model",
            "Build another type (int8, fp32); if that passes, this precision is too coarse for the model.",
        )
    return hop


def _same_tokens(
    runner: OnnxRunner, messages: Sequence[dict[str, Any]], text: str, prompt: list[int], name: str
) -> None:
    rendered = runner.render(messages)
    if rendered != text:
        raise StepFailed(
            f"prompt {name}: onnxruntime-genai renders the chat template as {rendered[-80:]!r}, "
            f"transformers as {text[-80:]!r}",
            "Simplify chat_template.jinja: this runtime knows a part of jinja2.",
        )
    ids = runner.encode_text(text)
    if ids != prompt:
        at = next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt)))
        raise StepFailed(
            f"prompt {name}: onnxruntime-genai cuts the text into other tokens than transformers, from token {at} on",
            "The tokenizer does not fit this runtime: ship GGUF for it.",
        )


def _tie(logits: np.ndarray, token: int, difference: float, onnx_dir: Path, name: str) -> None:
    """Accept another greedy token only where the reference holds the two for equal, within ``difference``."""
    gap = float(logits.max() - logits[token])
    if gap > 2 * difference:
        raise StepFailed(
            f"{onnx_dir}: prompt {name}: greedy texts part at a token that transformers holds {gap:.3g} logits behind, "
            f"and the logits differ by {difference:.3g} only: the runtime and the plain session disagree",
            "Report it to onnxruntime-genai with this folder.",
        )
