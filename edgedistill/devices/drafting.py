"""What a draft model brings on this machine: the same prompts answered with it and without it, turn by turn in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill.devices.host import HostFingerprint, fingerprint
from edgedistill.devices.local import Others, Steps, Worker, noise_of, ratio_of
from edgedistill.devices.protocol import Messages, Progress, Ratio, Settings
from edgedistill.errors import StepFailed, UsageError
from edgedistill.evals.statistics import Estimate, clustered_mean, clustered_proportion

TIE = 0.05
"""Logits this close are equal to rounding: a batch is multiplied by other kernels than a single token, and may choose the other."""


@dataclass(frozen=True, kw_only=True)
class DraftMeasurement:
    """One draft beside its model. ``answer`` is the ratio of tokens/s from the messages to the last token, both models' reading
    of the prompt included; ``decode`` that after the first token.
    """

    settings: Settings
    host: HostFingerprint
    runner: dict[str, str]
    acceptance: Estimate  # share of the drafted tokens that were kept; n counts tokens
    tokens_per_check: Estimate  # tokens that one batch of the model gives; 1 without a draft
    answer: Ratio
    decode: Ratio
    prompts: int
    ties: int  # answers that differ, each from a place on where two tokens are equal to rounding
    peak_rss: int  # bytes of the process with both models and their caches
    load_of_others: float | None
    noise: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """Whether whole answers come sooner: "helped", "hurt", or "undecided" where the interval holds 1."""
        return "helped" if self.answer.low > 1 else "hurt" if self.answer.high < 1 else "undecided"

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        return {
            "settings": self.settings.to_json(), "host": self.host.to_json(), "runner": dict(self.runner),
            "acceptance": self.acceptance.to_json(), "tokens_per_check": self.tokens_per_check.to_json(),
            "answer": self.answer.to_json(), "decode": self.decode.to_json(), "prompts": self.prompts, "ties": self.ties,
            "peak_rss": self.peak_rss, "load_of_others": self.load_of_others, "noisy": bool(self.noise),
            "noise": list(self.noise), "verdict": self.verdict,
        }  # fmt: skip


def measure_draft(
    model: Path,
    draft: Path,
    settings: Settings,
    *,
    prompts: Sequence[Messages],
    tokens: int,
    min_probability: float,
    progress: Progress | None = None,
) -> DraftMeasurement:
    """Answer every prompt with the draft and without, in turns, up to ``settings.answer_tokens`` tokens, greedily.

    Raises StepFailed where an answer with the draft is another one, but for what rounding decides, and UsageError where no answer
    has tokens to draft.
    """
    say, others = Steps(progress, total=1 + len(prompts)), Others()
    say(f"loading {model.name} and {draft.name}")
    options = {"path": str(draft.resolve()), "tokens": tokens, "min_probability": min_probability}
    pairs: list[dict[bool, dict[str, Any]]] = []
    ties = peak = 0
    with Worker(model, settings.threads, draft=options, kv=settings.kv) as worker:

        def ask(messages: Messages, drafted: bool) -> dict[str, Any]:
            return worker.ask(
                "draft",
                messages=messages,
                limit=settings.answer_tokens,
                context=settings.context,
                drafted=drafted,
            )

        for drafted in (True, False):  # warm-up
            ask(prompts[0], drafted)
        for number, messages in enumerate(prompts):
            say(f"prompt {number + 1}/{len(prompts)}")
            pair: dict[bool, dict[str, Any]] = {}
            for drafted in (True, False) if number % 2 == 0 else (False, True):
                with others.watch(worker):
                    pair[drafted] = ask(messages, drafted)
            ties += _differ(worker, messages, pair[True]["tokens"], pair[False]["tokens"], settings.context)
            peak = max(peak, pair[True]["peak_rss"])
            pairs.append(pair)
        runner = worker.loaded["runner"]
    with_draft, without = [pair[True] for pair in pairs], [pair[False] for pair in pairs]
    told = [one for one in with_draft if one["drafted"]]
    decoded = [pair for pair in pairs if min(len(pair[drafted]["tokens"]) for drafted in pair) > 1]
    if not decoded:
        raise UsageError(
            f"{model}: no answer of {len(prompts)} has a second token", "measure a draft on longer answers"
        )
    checked = [one for one in with_draft if one["checks"]]
    return DraftMeasurement(
        settings=settings,
        host=fingerprint(),
        runner=runner,
        acceptance=clustered_proportion([one["accepted"] for one in told], [one["drafted"] for one in told])
        if told
        else Estimate(value=0.0, low=0.0, high=0.0, n=0, method="nothing was drafted"),
        tokens_per_check=clustered_mean(
            [len(one["tokens"]) - 1 for one in checked], [one["checks"] for one in checked]
        )[0],
        answer=ratio_of(*([len(one["tokens"]) / one["last"] for one in side] for side in (with_draft, without))),
        decode=ratio_of(*([_decode_speed(pair[drafted]) for pair in decoded] for drafted in (True, False))),
        prompts=len(prompts),
        ties=ties,
        peak_rss=peak,
        load_of_others=others.load,
        noise=noise_of({}, others.load, settings.threads),
    )


def _decode_speed(spoken: dict[str, Any]) -> float:
    return (len(spoken["tokens"]) - 1) / (spoken["last"] - spoken["first"])


def _differ(worker: Worker, messages: Messages, ours: list[int], plain: list[int], context: int) -> bool:
    """Tell whether an answer differs, at a place where two tokens are equal to rounding; raise StepFailed at any other."""
    if ours == plain:
        return False
    at = next((at for at, (one, other) in enumerate(zip(ours, plain, strict=False)) if one != other), None)
    if at is None:
        what = f"writes {len(ours)} tokens where it writes {len(plain)} without"
    else:
        asked = {"before": plain[:at], "one": plain[at], "other": ours[at]}
        gap = worker.ask("gap", messages=messages, context=context, **asked)["gap"]
        if abs(gap) <= TIE:
            return True
        what = f"writes token {ours[at]} where it writes {plain[at]} without, {gap:.3f} logits apart"
    raise StepFailed(
        f"{worker.artifact}: with its draft it {what}",
        "this is an error of edgedistill: report it, and leave [draft] out",
    )
