"""Prove the hop from transformers to llama.cpp: same token ids, same greedy text, same logits, same configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgedistill.errors import StepFailed, UsageError
from edgedistill.formats.gguf.architectures import rope_of
from edgedistill.formats.gguf.checkpoint import read_config
from edgedistill.formats.gguf.read import GgufInfo, read_info
from edgedistill.formats.gguf.vocabulary import load_tokenizer

if TYPE_CHECKING:
    import numpy as np

# A text, token ids, or the messages of a conversation.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

# Shares of the spread of the logits. A faithful f16 hop of SmolLM2-135M measures 0.019 and 0.0015 here, forgotten q/k
# reordering 5.5 and 1.3.
MAX_DIFF = 0.1
MEAN_DIFF = 0.01
# Nats. A token at which no answer is read may have a state that stands on the edge: after training, the second one of every prompt
# moved by 0.22 of the spread in f16 and by 0.02 in f32, where what it says moved by 0.02 nats. Wrong weights say something else.
SAME = 0.1


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """Token ids compared: over how many texts and tokens all three tokenizers agreed."""

    texts: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class HopReport:
    """Logits compared on the prompts' tokens, in nats and logit units; the reference is transformers in float32.

    ``spread`` is the standard deviation of the reference logits, which gives the differences a scale. ``max_diff`` leaves out the
    ``moved`` tokens, at which logits are further apart than is allowed and say the same (KLD of ``SAME`` at most).
    ``greedy_ties`` counts prompts whose greedy texts part at two tokens that the reference itself holds for equal within
    the difference.
    """

    prompts: int
    tokens: int
    max_diff: float
    mean_diff: float
    spread: float
    kld: float
    top1: float
    moved: int
    greedy_tokens: int
    greedy_ties: int
    texts: TokenReport
    echo: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_tokens(model_dir: Path | str, gguf: Path | str, texts: Sequence[str]) -> TokenReport:
    """Require that transformers, tokenizer.json and llama.cpp give the same token ids on every text.

    Texts should be the user's own. Special tokens in the text are parsed; the BOS that a tokenizer adds is compared
    too. Raises StepFailed at the first difference, saying between whom and where; UsageError when there is no text.
    """
    from transformers import AutoTokenizer

    from edgedistill.formats.gguf.model_io import open_model

    model_dir = Path(model_dir)
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError("no text to compare token ids on", "pass the prompts of the recipe")
    plain = load_tokenizer(model_dir)
    hugging = AutoTokenizer.from_pretrained(model_dir)
    model = open_model(gguf, vocab_only=True)
    total = 0
    try:
        for text in texts:
            for special in (False, True):
                want = plain.encode(text, add_special_tokens=special).ids
                theirs = list(hugging.encode(text, add_special_tokens=special))
                if theirs != want:
                    raise StepFailed(
                        f"transformers tokenizes {_around(text, want, theirs, plain)} otherwise than "
                        f"{model_dir}/tokenizer.json",
                        f"set \"tokenizer_class\": \"PreTrainedTokenizerFast\" in {model_dir}/tokenizer_config.json: "
                        f"{type(hugging).__name__} rebuilds its pre-tokenizer",
                    )  # fmt: skip
                ours = model.tokenize(text.encode(), add_bos=special, special=True)
                if ours != want:
                    raise StepFailed(
                        f"llama.cpp tokenizes {_around(text, want, ours, plain)} otherwise than "
                        f"{model_dir}/tokenizer.json",
                        f"look at tokenizer.ggml.pre ({read_info(gguf).tokenizer_pre!r}) and add_bos_token in {gguf}",
                    )
                total += len(want)
    finally:
        model.close()
    return TokenReport(texts=len(texts), tokens=total)


def _around(text: str, want: list[int], got: list[int], tokenizer: Any) -> str:
    at = next(
        (i for i, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), min(len(want), len(got))
    )
    piece = tokenizer.decode(want[max(0, at - 2) : at + 4], skip_special_tokens=False)
    return f"{piece!r} (token {at} of {text[:30]!r}: {got[at : at + 3]} instead of {want[at : at + 3]})"


def compare_config(model_dir: Path | str, gguf: Path | str) -> dict[str, Any]:
    """Require that the GGUF states what config.json does (depth, heads, theta, eps, tie, special tokens, template).

    Returns the compared values. Raises StepFailed naming the first key that differs.
    """
    model_dir = Path(model_dir)
    config, info = read_config(model_dir), read_info(gguf)
    heads = int(config["num_attention_heads"])
    tied = not any(tensor.name == "output.weight" for tensor in info.tensors)
    pairs: dict[str, tuple[Any, Any]] = {
        "num_hidden_layers": (config["num_hidden_layers"], info.n_layers),
        "hidden_size": (config["hidden_size"], info.hidden),
        "vocab_size": (config["vocab_size"], info.vocab),
        "num_attention_heads": (heads, info.of_arch("attention.head_count")),
        "num_key_value_heads": (
            config.get("num_key_value_heads") or heads,
            info.of_arch("attention.head_count_kv", heads),
        ),
        "rope_theta": (float(rope_of(config)["rope_theta"]), float(info.of_arch("rope.freq_base", 10000.0))),
        **_epsilon(config, info),
        "tie_word_embeddings": (bool(config.get("tie_word_embeddings", False)), tied),
    }
    for key in ("bos", "eos"):
        value = config.get(f"{key}_token_id")
        if isinstance(value, int):
            pairs[f"{key}_token_id"] = (value, info.metadata.get(f"tokenizer.ggml.{key}_token_id"))
    template = _template(model_dir)
    if template:
        pairs["chat_template"] = (template, info.chat_template)
    for key, (want, got) in pairs.items():
        same = (
            abs(want - got) <= 1e-6 * abs(want) if isinstance(want, float) and isinstance(got, float) else want == got
        )
        if not same:
            raise StepFailed(
                f"{gguf}: {key} is {str(got)[:80]!r}, {model_dir}/config.json and its tokenizer say {str(want)[:80]!r}",
                "convert the model again",
            )
    return {key: got for key, (_, got) in pairs.items() if key != "chat_template"} | {"chat_template": bool(template)}


def _epsilon(config: dict[str, Any], info: GgufInfo) -> dict[str, tuple[Any, Any]]:
    """Return what the norms add under the root, as config.json and as the GGUF have it; GPT-2's norms have a mean."""
    ours, theirs = (
        ("layer_norm", "layer_norm") if config.get("model_type") == "gpt2" else ("rms_norm", "layer_norm_rms")
    )
    key = f"{ours}_epsilon" if ours == "layer_norm" else f"{ours}_eps"
    return {key: (float(config[key]), float(info.of_arch(f"attention.{theirs}_epsilon", 0.0)))}


def _template(folder: Path) -> str:
    from edgedistill.model_facts import read_json

    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return template if isinstance(template, str) else ""


def compare_logits(
    model_dir: Path | str, gguf: Path | str, prompts: Sequence[Prompt], *, texts: Sequence[str] = (), greedy: int = 16,
    threads: int | None = None,
) -> HopReport:  # fmt: skip
    """Require that the unquantized ``gguf`` computes what transformers does on ``prompts``.

    A prompt is a text (encoded without added special tokens), token ids, or messages (rendered with the folder's chat
    template; their text alone where it has none). Token ids are compared first, on ``texts`` and on the prompts' own text. Raises
    StepFailed when the configuration or the ids differ, when logits differ by more than a share of their own spread
    (``MAX_DIFF`` where they do not say the same, ``MEAN_DIFF``), or when the greedy continuations of ``greedy`` tokens part at
    anything but a tie.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from edgedistill.formats.gguf.model_io import all_logits, open_model

    echo = compare_config(model_dir, gguf)
    tokenizer = load_tokenizer(Path(model_dir))
    rendered = [_render(Path(model_dir), prompt) for prompt in prompts]
    rows = [
        tokenizer.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else prompt
        for prompt in rendered
    ]
    rows = [row for row in rows if row]
    if not rows:
        raise UsageError("no prompt to compare logits on", "pass a few prompts of the recipe")
    texts = [*texts, *(prompt for prompt in rendered if isinstance(prompt, str))]
    tokens = compare_tokens(model_dir, gguf, texts) if texts else TokenReport(texts=0, tokens=0)
    longest = max(map(len, rows)) + greedy
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model = open_model(gguf, n_ctx=longest, threads=threads)
    diffs: list[float] = []
    worst, divergence, agree, count, spread, moved, ties, made = 0.0, 0.0, 0, 0, 0.0, 0, 0, 0
    try:
        for row in rows:
            with torch.inference_mode():
                want = reference(torch.tensor([row])).logits[0].numpy()
            # The vocabulary may be padded differently; llama.cpp's rows are the embedding's, and so are these.
            got = all_logits(model, row)
            peak, off = farthest(want, got)
            worst, moved, spread = max(worst, peak), moved + off, spread + float(want.std()) * len(row)
            diffs.append(float(np.abs(want - got).mean()) * len(row))
            divergence += float(kld(want, got).sum())
            agree += int((want.argmax(-1) == got.argmax(-1)).sum())
            count += len(row)
            tie, agreed = _compare_greedy(reference, model, row, greedy, peak, tokenizer)
            ties, made = ties + tie, made + agreed
    finally:
        model.close()
    report = HopReport(
        prompts=len(rows), tokens=count, max_diff=worst, mean_diff=sum(diffs) / count, spread=spread / count,
        kld=divergence / count, top1=agree / count, moved=moved, greedy_tokens=made, greedy_ties=ties,
        texts=tokens, echo=echo,
    )  # fmt: skip
    few = moved <= max(len(rows), count // 20)  # a token of each prompt, since they may all begin alike
    if not (few and worst <= MAX_DIFF * report.spread and report.mean_diff <= MEAN_DIFF * report.spread):
        raise StepFailed(
            f"{gguf}: logits differ from transformers' by {report.mean_diff:.3g} on average and {report.max_diff:.3g} "
            f"at most, where they spread over {report.spread:.3g} "
            f"(allowed: {MEAN_DIFF:.0%} and {MAX_DIFF:.0%} of it); {moved} of {count} tokens, left out of that, are further apart "
            f"and say the same; KLD {report.kld:.2g}",
            "look at the RoPE settings and the order of the q/k rows: edgedistill's converter does not know this model",
        )
    return report


def _render(model_dir: Path, prompt: Prompt) -> str | list[int]:
    """Return text or token ids; messages are rendered with the chat template of the folder, where it has one."""
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        from transformers import AutoTokenizer

        hugging = AutoTokenizer.from_pretrained(model_dir)
        messages = [dict(cast(Mapping[str, Any], message)) for message in prompt]
        if not hugging.chat_template:  # a base model: it is shown the text alone
            return "\n".join(str(message.get("content") or "") for message in messages)
        return str(hugging.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return [int(cast(int, token)) for token in prompt]


def kld(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Return KL(want || got) per row, in nats, from logits of shape (rows, vocabulary)."""
    import numpy as np

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(want), log_softmax(got)
    return (np.exp(p) * (p - q)).sum(-1)


def farthest(want: np.ndarray, got: np.ndarray) -> tuple[float, int]:
    """Return the largest difference of two logits of shape (rows, vocabulary), and how many rows it leaves out: those that are
    further apart than ``MAX_DIFF`` allows and say the same.
    """
    import numpy as np

    peaks = np.abs(want - got).max(-1)
    moved = (peaks > MAX_DIFF * float(want.std())) & (kld(want, got) <= SAME)
    return float(peaks[~moved].max(initial=0.0)), int(moved.sum())


def _compare_greedy(
    reference: Any, model: Any, row: list[int], count: int, noise: float, tokenizer: Any
) -> tuple[int, int]:
    """Return (1 when the texts part at a tie, tokens that agreed). Raises StepFailed when they part elsewhere."""
    import torch

    from edgedistill.formats.gguf.model_io import greedy

    if count <= 0:
        return 0, 0
    theirs = greedy(model, row, count)
    with torch.inference_mode():
        logits = reference(torch.tensor([row + theirs])).logits[0, len(row) - 1 : -1]
    best = logits.argmax(-1).tolist()
    for i, (want, got) in enumerate(zip(best, theirs, strict=True)):
        if want == got:
            continue
        gap = float(logits[i, want] - logits[i, got])
        # Two logits may each be off by the noise seen on the prompt, or a little more further on.
        if gap <= 3 * noise:
            return 1, i
        raise StepFailed(
            f"greedy decoding parts at token {i + 1}: llama.cpp says {tokenizer.decode([got])!r}, transformers "
            f"{tokenizer.decode([want])!r} ({gap:.3g} apart in logits, the noise is {noise:.3g})",
            "look at the RoPE settings, the attention scale and the chat template's special tokens",
        )
    return 0, len(theirs)
