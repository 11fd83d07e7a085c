"""Grades of answers by a model in this process: perplexity under a language model, and the score of a reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgedistill.data.judging import shown
from edgedistill.errors import StepFailed, UsageError
from edgedistill.training.data import Example, encode_example
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.precision import pick_device, torch_dtype
from edgedistill.training.quiet import quiet

TOKENS, MOST_ROWS = 2048, 96
"""Tokens and rows of a batch, padding included."""
CHUNK = 128  # positions whose logits are held at once
Encoded = Mapping[str, list[int]]
"""What a model reads of a row, as JSON can hold it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A conversation and the answer to it that is graded."""

    key: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    answer: str


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the rows in batches, by length: fixed before anything runs, so that a resumed run has the same ones."""
    order = sorted(range(len(lengths)), key=lambda at: (lengths[at], at))
    found: list[list[int]] = []
    for at in order:
        if found and len(found[-1]) < MOST_ROWS and (len(found[-1]) + 1) * lengths[at] <= TOKENS:
            found[-1].append(at)
        else:
            found.append([at])
    return found


class Perplexity:
    """Give the perplexity of answers under a causal language model: exp of the mean negative log-likelihood of the answer's tokens,
    the one that ends it included, given the conversation.
    """

    def __init__(self, folder: Path) -> None:
        from edgedistill.teachers.transformers import TransformersTeacher

        self.model = TransformersTeacher(folder)

    def encode(self, asked: Asked) -> Encoded | None:
        """Return the token ids of prompt and answer; None where they do not fit the context."""
        if not asked.answer.strip():
            return None
        example = encode_example(
            self.model.tokenizer,
            [dict(one) for one in asked.messages],
            asked.answer,
            tools=[dict(one) for one in asked.tools],
            id=asked.key,
        )
        if example.length > self.model.context:
            return None
        return {"prompt": list(example.prompt_ids), "answer": list(example.completion_ids)}

    def length(self, encoded: Encoded) -> int:
        """Return the number of tokens of a row."""
        return len(encoded["prompt"]) + len(encoded["answer"])

    @torch.inference_mode()
    def grade(self, rows: Sequence[Encoded], keys: Sequence[str]) -> list[float]:
        """Return the perplexity of each row of a batch. Raises StepFailed where it is not finite."""
        pairs = zip(keys, rows, strict=True)
        examples = [Example(key, tuple(one["prompt"]), tuple(one["answer"])) for key, one in pairs]
        model = self.model.model
        head = model.get_output_embeddings()
        weight = head.weight[: self.model.vocab_size]
        bias = None if head.bias is None else head.bias[: self.model.vocab_size]
        with packed_mode(model) as packed:
            batch = make_batch(examples, packed=packed)
            states = completion_states(model, batch)
        targets = batch.targets.to(states.device)
        found = []
        for low in range(0, len(states), CHUNK):
            logits = torch.nn.functional.linear(states[low : low + CHUNK], weight, bias).float()
            logprobs = torch.log_softmax(logits, dim=-1)
            found.append(logprobs.gather(1, targets[low : low + CHUNK, None])[:, 0].double())
        each = torch.cat(found).cpu().split([len(one.completion_ids) for one in examples])
        out = []
        for one, logprobs in zip(examples, each, strict=True):
            mean = -float(logprobs.mean())
            if not math.isfinite(mean):
                raise StepFailed(
                    f"answer {one.id[:12]}: the model gives it no probability (log-likelihood {-mean})",
                    "the model is damaged (NaN weights?): check the checkpoint",
                )
            out.append(math.exp(min(mean, 700.0)))
        return out


class Reward:
    """Give the score of a sequence classifier: its one logit, or the probability of ``label`` among several.

    The conversation and the answer are put together by the checkpoint's chat template. One without a template reads them as a pair
    of texts, what the user says and the answer. Raises UsageError for what cannot be loaded.
    """

    def __init__(self, folder: Path, label: str | None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = pick_device()
        self.dtype = torch_dtype("auto", device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            with quiet():
                model: Any = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=self.dtype, trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"{folder}: cannot be loaded as a sequence classifier: {first}") from error
        self.model: Any = model.eval().requires_grad_(False).to(device)
        head = getattr(self.model, "score", None)
        if isinstance(
            head, torch.nn.Linear
        ):  # decoders': a score in bf16 has 8 bits, too few to tell good answers from better ones
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        self.label = None if label is None else int(self.model.config.label2id[label])
        self.context = int(getattr(self.model.config, "max_position_embeddings", 0) or 2**31)
        self.pad = self.model.config.pad_token_id

    def encode(self, asked: Asked) -> Encoded | None:
        """Return the inputs of one row; None where they do not fit the context."""
        messages = [dict(one) for one in asked.messages]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": asked.answer}],
                tools=[dict(one) for one in asked.tools] or None,
                tokenize=False,
            )
            found = self.tokenizer(text, add_special_tokens=False)
        else:
            said = messages[0]["content"] if len(messages) == 1 else shown(messages)
            found = self.tokenizer(said, asked.answer)
        inputs = {name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found}
        return inputs if 0 < len(inputs["input_ids"]) <= self.context else None

    def length(self, encoded: Encoded) -> int:
        """Return the number of tokens of a row."""
        return len(encoded["input_ids"])

    @torch.inference_mode()
    def grade(self, rows: Sequence[Encoded], keys: Sequence[str]) -> list[float]:
        """Return the score of each row of a batch. Raises StepFailed where one is not finite."""
        logits = torch.cat([self._logits(part) for part in self._parts(rows)]).float()
        scores = logits[:, 0] if self.label is None else torch.softmax(logits, dim=-1)[:, self.label]
        if not torch.isfinite(scores).all():
            raise StepFailed(
                "the reward model's score is not finite", "it is damaged (NaN weights?): check the checkpoint"
            )
        return scores.tolist()

    def _parts(self, rows: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        """Cut a batch where it cannot be padded: decoders find the last token of a row by the padding behind it."""
        return [rows] if self.pad is not None else [[row] for row in rows]

    def _logits(self, rows: Sequence[Encoded]) -> torch.Tensor:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad or 0}
        inputs = {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows])
            for name in rows[0]
        }
        inputs["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        )
        device = next(self.model.parameters()).device
        return self.model(**{name: one.to(device) for name, one in inputs.items()}).logits.cpu()
