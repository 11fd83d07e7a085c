"""A student with a smaller vocabulary: the rows of the embedding that the task's text never asks for are cut out.

In a small model the embedding is a fifth to a third of all weights, and most of its rows stand for words that the task
never sees. Cut are the rows, and the merges that lead to them; text that needed them is spelt in smaller pieces, down to
single bytes, so all that could be written before still can. The kept tokens hold every token of the given rows *and what
it is merged from*, so these rows are cut into the same pieces as before, one for one: the teacher's distributions and
hidden states still belong to them, under other numbers (``Origin``). The rest is filled up by merge rank, most frequent
first.

What it costs is copying: a word that the rows never had, cut into pieces, is spelt wrong more often. On the quickstart's
task a healed student (30 layers of 1,120 neurons) had 0.85 and 0.70 of further dev rows right (n = 600 and 360); the same
cut to 16,384 of 49,152 tokens 0.85 and 0.66; another, healed on rows of which 41 % were in pieces, 0.79 and 0.59.

Sources: Abdaoui et al. 2020 (arXiv:2010.05609); Ushio et al. 2023, vocabulary trimming (arXiv:2305.15020).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.targets import SparseTargets, tokenizer_hash

ORIGIN = "tokenizer_origin.json"
"""Beside a trimmed tokenizer.json: which tokenizer it was cut out of, and the numbers of the kept tokens there."""
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "unk_token_id")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the tokens of a trimmed tokenizer come from: token i was ``kept[i]`` of the tokenizer with this hash."""

    tokenizer: str
    kept: np.ndarray  # int64 [tokens of the trimmed tokenizer], ascending

    @cached_property
    def numbers(self) -> np.ndarray:
        """Return the trimmed number of each original token, -1 for those cut away: int64 [largest kept + 1]."""
        numbers = np.full(int(self.kept[-1]) + 1, -1, dtype=np.int64)
        numbers[self.kept] = np.arange(len(self.kept))
        return numbers

    def example(self, example: Example) -> Example:
        """Return the example in the original tokenizer's numbers."""
        return Example(
            example.id,
            tuple(self.kept[list(example.prompt_ids)].tolist()),
            tuple(self.kept[list(example.completion_ids)].tolist()),
            example.weight,
            example.weights,
        )

    def targets(self, targets: SparseTargets, example: Example) -> SparseTargets:
        """Return soft targets in the trimmed tokenizer's numbers, without the tokens that were cut away.

        Top-k: their probability joins the tail. Else a position's draws are the kept ones (their weights add up to 1 again
        when the loss asks), and so are its probabilities: those of a teacher that knows no other tokens, as far as the draws
        tell what these would hold. Where none is left, the token of the text itself is the only draw, and certain.
        """
        targets = targets.as_draws()
        inside = targets.ids < len(self.numbers)
        found = np.where(inside, self.numbers[np.where(inside, targets.ids, 0)], -1)
        stays = found >= 0
        if targets.kind == "sampled":
            stays &= targets.counts > 0  # a best id without any probability is no draw
        left = np.bincount(targets.rows[stays], minlength=targets.positions)
        ids, logp, normalisers = found[stays], targets.logp[stays], targets.normalisers
        if targets.kind == "sampled" and not stays.all():
            at_1, *others = (_log_share(targets, stays, t) for t in (1.0, *targets.temperatures))
            logp = logp - at_1[targets.rows[stays]]
            shifts = [share - at_1 / t for share, t in zip(others, targets.temperatures, strict=True)]
            normalisers = (normalisers + np.stack(shifts, axis=1)) if shifts else normalisers
            normalisers = np.where((left > 0)[:, None], normalisers, 0.0).astype(np.float32)
        counts = targets.counts[stays] if targets.kind == "sampled" else targets.counts
        if targets.kind == "sampled" and len(empty := np.flatnonzero(left == 0)):
            at = np.concatenate(([0], np.cumsum(left)))[empty]
            ids = np.insert(ids, at, np.asarray(example.completion_ids)[empty])
            logp, counts = np.insert(logp, at, 0.0), np.insert(counts, at, float(targets.n))
            left[empty] = 1
        return SparseTargets(
            kind=targets.kind,
            n=targets.n,
            temperature=targets.temperature,
            temperatures=targets.temperatures,
            offsets=np.concatenate(([0], np.cumsum(left))),
            ids=ids.astype(np.int32),
            counts=counts.astype(np.float32),
            logp=logp.astype(np.float32),
            normalisers=normalisers,
        )


def _log_share(targets: SparseTargets, stays: np.ndarray, temperature: float) -> np.ndarray:
    """Estimate the log of the probability that some tokens hold together at a temperature, from the draws: [positions].

    ``stays`` tells which of the draws they are. Draws at another temperature count by the ratio of their probabilities,
    normalised over the position; a position where none stays gives 0.
    """
    exponent = targets.logp.astype(np.float64) * (1.0 / temperature - 1.0 / targets.temperature)
    highest = np.full(targets.positions, -np.inf)
    np.maximum.at(highest, targets.rows, exponent)
    weights = targets.counts * np.exp(exponent - highest[targets.rows])
    every = np.bincount(targets.rows, weights, targets.positions)
    some = np.bincount(targets.rows[stays], weights[stays], targets.positions)
    return np.log(np.divide(some, every, out=np.ones_like(some), where=some > 0))


def origin_towards(model: Path, teacher: Path) -> Origin | None:
    """Return where a student's tokens come from in the numbers of its teacher; None where both have the same.

    A student that is cut out of a trimmed link inherits the link's tokenizer, and with it the note of where that one was cut
    from: another model than the one that teaches it.
    """
    own, other = model / "tokenizer.json", teacher / "tokenizer.json"
    if own.is_file() and other.is_file() and own.read_bytes() == other.read_bytes():
        return None
    return read_origin(model)


def read_origin(model: Path) -> Origin | None:
    """Read where the vocabulary of a checkpoint comes from; None where it is its own."""
    path = model / ORIGIN
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    return Origin(tokenizer=data["tokenizer"], kept=np.asarray(data["kept"], dtype=np.int64))


def choose_tokens(source: Path, used: Iterable[int], size: int) -> np.ndarray:
    """Choose the ``size`` tokens to keep, ascending int64: added tokens, single bytes, ``used`` ones with all that they
    are merged from, then the others by merge rank.

    Raises UsageError when the used ones alone need more.
    """
    data = json.loads((source / "tokenizer.json").read_text())
    vocab: dict[str, int] = data["model"]["vocab"]
    merges = _merges(data)
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    added = {int(token["id"]) for token in data.get("added_tokens", [])}
    tokens = {number: token for token, number in vocab.items()}
    keep = {token for token in vocab if len(token) == 1 or vocab[token] in added}
    extra = {number for number in added if number not in tokens}
    for number in set(used) - added:
        keep |= _pieces(tokens[number], ranks)
    if len(keep) + len(extra) > size:
        raise UsageError(
            f"student.vocabulary = {size}: the rows that are taught need {len(keep) + len(extra)} tokens",
            f"set student.vocabulary to {-(-(len(keep) + len(extra)) // 64) * 64} or more, or teach fewer rows",
        )
    for left, right in merges:
        if len(keep) + len(extra) == size:
            break
        if left + right in keep or left + right not in vocab:
            continue
        wanted = _pieces(left + right, ranks) - keep
        if len(keep) + len(extra) + len(wanted) <= size:
            keep |= wanted
    return np.asarray(sorted({vocab[token] for token in keep} | extra), dtype=np.int64)


def _merges(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a tokenizer.json by rank; older files hold them as "left right"."""
    pairs = (merge if isinstance(merge, list) else merge.split(" ", 1) for merge in data["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _pieces(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Return the token and everything that BPE merges on the way to it: no merge that crosses the ends of a token can
    have come first, so its way is the same in every word.
    """
    parts, seen = list(token), {token, *token}
    while len(parts) > 1:
        pairs = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not pairs:
            break  # a token that no merge makes: taken whole (ignore_merges) or not at all
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return seen


def write_trimmed_tokenizer(source: Path, target: Path, kept: np.ndarray) -> None:
    """Write the tokenizer of ``source``, cut to the ``kept`` tokens, into ``target``, with the settings that name tokens
    by number, and the way back (``Origin``).
    """
    from transformers import AutoTokenizer

    origin = tokenizer_hash(AutoTokenizer.from_pretrained(source))
    numbers = {int(number): at for at, number in enumerate(kept)}
    data = json.loads((source / "tokenizer.json").read_text())
    vocab: dict[str, int] = data["model"]["vocab"]
    stays = {token: numbers[number] for token, number in vocab.items() if number in numbers}
    merges = [pair for pair in _merges(data) if {*pair, "".join(pair)} <= stays.keys()]
    data["model"]["vocab"] = dict(sorted(stays.items(), key=lambda pair: pair[1]))
    data["model"]["merges"] = [list(pair) for pair in merges]
    for token in data.get("added_tokens", []):
        token["id"] = numbers[int(token["id"])]
    for special in _special_tokens(data.get("post_processor")):
        special["ids"] = [numbers[int(number)] for number in special["ids"]]
    (target / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    for file in (*source.glob("*.jinja"), source / "special_tokens_map.json"):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    settings = source / "tokenizer_config.json"
    if settings.is_file():
        config = json.loads(settings.read_text())
        if decoder := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {str(numbers[int(number)]): token for number, token in decoder.items()}
        (target / settings.name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = source / "generation_config.json"
    if generation.is_file():
        renumbered = renumber(json.loads(generation.read_text()), numbers)
        (target / generation.name).write_text(json.dumps(renumbered, indent=2) + "\n")
    (target / ORIGIN).write_text(json.dumps({"tokenizer": origin, "kept": kept.tolist()}) + "\n")


def _special_tokens(processor: Any) -> list[dict[str, Any]]:
    """Find the tables of a post-processor that name special tokens by number (a BOS, in Llama 3)."""
    if not isinstance(processor, dict):
        return []
    nested = [table for part in processor.get("processors", []) for table in _special_tokens(part)]
    return [*nested, *(table for table in processor.get("special_tokens", {}).values() if "ids" in table)]


def renumber(config: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """Give the token ids of a config.json or generation_config.json their new numbers."""
    found = dict(config)
    for key in ID_KEYS:
        value = config.get(key)
        if isinstance(value, int):
            found[key] = numbers.get(value)
        elif isinstance(value, list):
            found[key] = [numbers[one] for one in value if one in numbers]
    return found


def trim_vocabulary(model: Any, kept: np.ndarray) -> Any:
    """Keep some rows of a causal LM's embedding and head, in place, and return it; its config and generation settings
    name the special tokens anew.
    """
    import torch

    rows = torch.as_tensor(kept)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for layer in [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()]):
        layer.weight = torch.nn.Parameter(layer.weight.data[rows].clone())
        bias = getattr(layer, "bias", None)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.data[rows].clone())
    model.get_input_embeddings().num_embeddings = len(kept)
    model.get_output_embeddings().out_features = len(kept)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.config.vocab_size = len(kept)
    numbers = {int(number): at for at, number in enumerate(kept)}
    padding = getattr(model.get_input_embeddings(), "padding_idx", None)
    if padding is not None:
        model.get_input_embeddings().padding_idx = numbers.get(int(padding))
    for settings in (model.config, model.generation_config):
        if settings is None:
            continue
        old = {key: getattr(settings, key, None) for key in ID_KEYS}
        for key, value in renumber(old, numbers).items():
            if old[key] is not None:
                setattr(settings, key, value)
    return model
