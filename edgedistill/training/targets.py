"""Sparse soft targets: what is kept of a teacher's distribution, and the Parquet file that it lives in.

``sampled`` (RS-KD, "Sparse Logit Sampling", ACL 2025): n ids drawn with replacement from softmax(z / T) at every
completion position, kept as unique ids with counts. The counts over n are an unbiased estimate of the distribution,
where a cut-off top-K is not. Each drawn id keeps its log-probability at T = 1, so that a near temperature re-weights.
``top-k``: the K best ids with their log-probability; the loss treats the rest as one bucket.
``top-sampled``: two thirds of n are the best ids, exact, and one third are draws from the rest, each of which stands for its
share of the rest's probability: as unbiased as draws, with less noise where the best ids hold most of the probability.

All keep, per position, the log-normalisers A(t) = logsumexp(log p / t) for a few temperatures t, with log p at T = 1:
log p_t(id) = log p(id) / t - A(t). A(1) is 0 and is not stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgedistill.errors import UsageError
from edgedistill.training.data import Example
from edgedistill.training.objectives import REACH

FORMAT = 1

Kind = Literal["sampled", "top-k", "top-sampled"]


@dataclass(frozen=True, kw_only=True)
class TargetsHeader:
    """What a file of targets was made with; stands in the schema metadata of the file."""

    kind: Kind
    n: int
    temperature: float
    temperatures: tuple[float, ...]
    vocab_size: int
    tokenizer: str
    teacher: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the header as plain values."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TargetsHeader:
        """Rebuild the header from ``to_json``."""
        return cls(**{**data, "temperatures": tuple(data["temperatures"])})


@dataclass(frozen=True, kw_only=True)
class SparseTargets:
    """Targets of one example: position t has the ids[offsets[t]:offsets[t + 1]] (int32) and their values.

    ``counts`` (sampled: how often each id was drawn, float32, may be re-weighted; top-sampled: 0 for the best ids, which are
    exact; top-k: empty), ``logp`` float32 at T = 1, ``normalisers`` float32 [positions, len(temperatures)].
    """

    kind: Kind
    n: int
    temperature: float
    temperatures: tuple[float, ...]
    offsets: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    logp: np.ndarray
    normalisers: np.ndarray

    @property
    def positions(self) -> int:
        """Number of completion tokens."""
        return len(self.offsets) - 1

    @property
    def rows(self) -> np.ndarray:
        """Position of each id: int64 [len(ids)]."""
        return np.repeat(np.arange(self.positions), np.diff(self.offsets))

    def normaliser(self, temperature: float) -> np.ndarray | None:
        """Return A(t) per position where it is known (stored, or t = 1), else None: float32 [positions]."""
        if abs(temperature - 1.0) < 1e-6:
            return np.zeros(self.positions, dtype=np.float32)
        for at, known in enumerate(self.temperatures):
            if abs(known - temperature) < 1e-4:
                return self.normalisers[:, at]
        return None

    def probabilities(self, temperature: float) -> np.ndarray:
        """Return the weight of each kept id at this temperature, float32 [len(ids)].

        Sampled: counts over n (they add up to 1 at each position), re-weighted if the draw was at another temperature;
        top-sampled: so too, the exact ids by their probability. Top-k: exact probabilities; what is missing to 1 is the tail.
        Raises UsageError for a temperature out of reach.
        """
        if self.kind == "top-sampled":
            return self.as_draws().probabilities(temperature)
        if self.kind == "sampled":
            if abs(temperature - self.temperature) > 1e-6:
                return reweight(self, self.temperature, temperature)[0].probabilities(temperature)
            total = np.add.reduceat(self.counts, self.offsets[:-1]) if len(self.ids) else np.zeros(0)
            return (self.counts / np.repeat(total, np.diff(self.offsets))).astype(np.float32)
        known = self.normaliser(temperature)
        if known is None:
            raise UsageError(
                f"these top-k targets hold no normaliser for temperature {temperature:g}; they have 1 and "
                + ", ".join(f"{one:g}" for one in self.temperatures),
                hint="score again with that temperature, or use one of those",
            )
        return np.exp(self.logp / temperature - np.repeat(known, np.diff(self.offsets))).astype(np.float32)

    def as_draws(self) -> SparseTargets:
        """Turn top-sampled targets into weighted draws at their temperature; draws stay what they are.

        The best ids count n times their probability, the draws share what is left to 1: their counts add up to n.
        """
        if self.kind != "top-sampled":
            return self
        known = self.normaliser(self.temperature)
        assert known is not None  # stored_temperatures
        sizes, drawn = np.diff(self.offsets), self.counts.astype(np.float64)
        p = np.exp(self.logp.astype(np.float64) / self.temperature - np.repeat(known, sizes))
        p[drawn > 0] = 0.0
        rest = np.clip(1.0 - np.bincount(self.rows, p, self.positions), 0.0, 1.0)
        total = np.maximum(np.bincount(self.rows, drawn, self.positions), 1.0)
        weights = p + drawn * np.repeat(rest / total, sizes)
        return replace(self, kind="sampled", counts=(self.n * weights).astype(np.float32))


def certain(example: Example, header: TargetsHeader) -> SparseTargets:
    """Return sampled targets that are sure of every token of the completion: all n draws are the token that is there."""
    positions = len(example.completion_ids)
    return SparseTargets(
        kind="sampled",
        n=header.n,
        temperature=header.temperature,
        temperatures=header.temperatures,
        offsets=np.arange(positions + 1),
        ids=np.asarray(example.completion_ids, dtype=np.int32),
        counts=np.full(positions, header.n, dtype=np.float32),
        logp=np.zeros(positions, dtype=np.float32),
        normalisers=np.zeros((positions, len(header.temperatures)), dtype=np.float32),
    )


def reweight(targets: SparseTargets, from_T: float, to_T: float) -> tuple[SparseTargets, float]:
    """Turn draws at ``from_T`` into weighted draws at ``to_T``; also return the mean effective sample size per
    position.

    Self-normalised importance weights: w proportional to p_to / p_from = exp(log p (1 / to - 1 / from)), scaled to add
    up to n. Effective sample size = (sum w)^2 / sum w^2 over the n draws. Raises UsageError beyond half a unit of
    temperature.
    """
    if targets.kind != "sampled":
        raise UsageError("only sampled targets are re-weighted; top-k targets are exact at their stored temperatures")
    if abs(targets.temperature - from_T) > 1e-6:
        raise UsageError(f"the targets were drawn at temperature {targets.temperature:g}, not {from_T:g}")
    if abs(to_T - from_T) > REACH + 1e-9 or to_T <= 0:
        raise UsageError(
            f"targets drawn at temperature {from_T:g} cannot be re-weighted to {to_T:g}: the variance "
            f"grows several times beyond {REACH:g} of a unit",
            hint=f"set score.temperature = {to_T:g} (one more forward over the same text)",
        )
    sizes = np.diff(targets.offsets)
    if not len(targets.ids):
        return replace(targets, temperature=to_T), float(targets.n)
    exponent = targets.logp.astype(np.float64) * (1.0 / to_T - 1.0 / from_T)
    exponent -= np.repeat(np.maximum.reduceat(exponent, targets.offsets[:-1]), sizes)
    factor = np.exp(exponent)
    counts = targets.counts.astype(np.float64)
    weights = counts * factor
    total = np.add.reduceat(weights, targets.offsets[:-1])
    square = np.add.reduceat(weights * factor, targets.offsets[:-1])
    drawn = np.add.reduceat(counts, targets.offsets[:-1])
    scaled = weights * np.repeat(drawn / total, sizes)
    return replace(targets, counts=scaled.astype(np.float32), temperature=to_T), float(np.mean(total**2 / square))


class TargetsWriter:
    """Write a Parquet file of targets, one row an example; the file appears under its name when ``close`` has run.

    Columns: example (string), tokens (16 bytes, hash of the token ids), sizes (ids per position), ids (flat), counts
    (flat, where there are draws), logp (flat, float16), normalisers (flat, float16). Flat lists, narrow types and zstd keep
    n = 12 under 48 bytes a token.
    """

    def __init__(self, path: Path, header: TargetsHeader) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.header = path, header
        self._partial = path.with_name(path.name + ".partial")
        id_type = pa.uint16() if header.vocab_size <= 65536 else pa.int32()
        fields = [
            ("example", pa.string()),
            ("tokens", pa.binary(16)),
            ("sizes", pa.list_(pa.uint8())),
            ("ids", pa.list_(id_type)),
            ("logp", pa.list_(pa.float16())),
            ("normalisers", pa.list_(pa.float16())),
        ]
        if header.kind != "top-k":
            fields.append(("counts", pa.list_(pa.uint8())))
        meta = {b"edgedistill": json.dumps({"format": FORMAT, **header.to_json()}, sort_keys=True).encode()}
        self._schema = pa.schema(fields, metadata=meta)
        self._pending: list[dict[str, Any]] = []
        if max(header.n, 1) > 255:
            raise UsageError(f"n = {header.n} draws a token: at most 255 can be stored")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pq.ParquetWriter(
            self._partial,
            self._schema,
            compression="zstd",
            compression_level=9,
            use_dictionary=["counts.list.element", "sizes.list.element"],  # pyright: ignore[reportArgumentType]
            # High bytes repeat, low bytes do not: apart, the former nearly vanish.
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("ids", "logp", "normalisers")},
            write_statistics=False,
        )

    def write(self, example: Example, targets: SparseTargets) -> None:
        """Add the targets of one example. Raises UsageError when they do not fit the example or the header."""
        if targets.positions != len(example.completion_ids):
            raise UsageError(
                f"row {example.id!r}: targets for {targets.positions} of {len(example.completion_ids)} tokens"
            )
        if (targets.kind, targets.temperature) != (self.header.kind, self.header.temperature):
            raise UsageError(f"row {example.id!r}: targets of another kind or temperature than the file's")
        row = {
            "example": example.id,
            "tokens": example.token_hash,
            "sizes": np.diff(targets.offsets).astype(np.uint8),
            "ids": targets.ids,
            "logp": np.maximum(targets.logp, -60000.0).astype(np.float16),
            "normalisers": targets.normalisers.astype(np.float16).ravel(),
        }
        if self.header.kind != "top-k":
            row["counts"] = np.rint(targets.counts).astype(np.uint8)
        self._pending.append(row)
        if len(self._pending) >= 2048:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        columns = []
        for field in self._schema:
            values = [row[field.name] for row in self._pending]
            if not pa.types.is_list(field.type):
                columns.append(pa.array(values, type=field.type))
                continue
            offsets = np.zeros(len(values) + 1, dtype=np.int32)
            np.cumsum([len(value) for value in values], out=offsets[1:])
            kind = field.type.value_type
            flat = np.concatenate(values).astype(kind.to_pandas_dtype())
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind)))
        self._file.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._pending.clear()

    def close(self) -> None:
        """Finish the file and give it its name."""
        self._flush()
        self._file.close()
        os.replace(self._partial, self.path)

    def __enter__(self) -> TargetsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def read_header(path: Path) -> TargetsHeader:
    """Read what a file of targets was made with. Raises UsageError for a file that is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_schema(path).metadata or {}
        data = json.loads(meta[b"edgedistill"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UsageError(f"{path}: not a file of soft targets ({type(error).__name__})") from error
    if data.pop("format", None) != FORMAT:
        raise UsageError(f"{path}: soft targets of another format", hint="build the score step again")
    return TargetsHeader.from_json(data)


def iter_targets(path: Path) -> Iterator[tuple[str, bytes, SparseTargets]]:
    """Yield (example id, token hash, targets) for each row of the file."""
    import pyarrow.parquet as pq

    header = read_header(path)
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
        names = batch.column("example").to_pylist()
        hashes = batch.column("tokens").to_pylist()
        flat = {}
        for name in ("sizes", "ids", "logp", "normalisers", "counts"):
            if name in batch.schema.names:
                column = batch.column(name)
                flat[name] = (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False))

        def part(name: str, row: int, flat: dict[str, Any] = flat) -> np.ndarray:
            offsets, values = flat[name]
            return values[offsets[row] : offsets[row + 1]]

        for row, (name, tokens) in enumerate(zip(names, hashes, strict=True)):
            sizes = part("sizes", row)
            offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
            np.cumsum(sizes, out=offsets[1:])
            drawn = header.kind != "top-k"
            yield (
                name,
                tokens,
                SparseTargets(
                    kind=header.kind,
                    n=header.n,
                    temperature=header.temperature,
                    temperatures=header.temperatures,
                    offsets=offsets,
                    ids=part("ids", row).astype(np.int32),
                    counts=part("counts", row).astype(np.float32) if drawn else np.zeros(0, np.float32),
                    logp=part("logp", row).astype(np.float32),
                    normalisers=part("normalisers", row)
                    .astype(np.float32)
                    .reshape(len(sizes), len(header.temperatures)),
                ),
            )


def read_targets(
    paths: Path | Iterable[Path], examples: Sequence[Example], *, tokenizer: str | None = None
) -> list[SparseTargets]:
    """Read the targets of these examples, in their order, from one file or several.

    Raises UsageError when a row is missing, when its tokens are not the ones that the teacher scored, or when the file
    was made with another tokenizer (``tokenizer`` is the hash to compare with).
    """
    found, scored = find_targets(paths, examples, tokenizer=tokenizer)
    for at, targets in enumerate(found):
        if targets is None:
            name = examples[at].id
            why = "its tokens are not the ones that were scored" if name in scored else "it was not scored"
            raise UsageError(f"row {name!r} has no soft targets: {why}", hint="build the score step again")
    return [targets for targets in found if targets is not None]


def find_targets(
    paths: Path | Iterable[Path], examples: Sequence[Example], *, tokenizer: str | None = None
) -> tuple[list[SparseTargets | None], set[str]]:
    """Find the targets of these examples, None where their tokens were not scored, and the ids of all rows that were.

    Raises UsageError when a file was made with another tokenizer.
    """
    places: dict[bytes, list[int]] = {}
    for at, example in enumerate(examples):
        places.setdefault(example.token_hash, []).append(at)
    found: list[SparseTargets | None] = [None] * len(examples)
    scored: set[str] = set()
    for path in [paths] if isinstance(paths, Path) else paths:
        header = read_header(path)
        if tokenizer is not None and header.tokenizer != tokenizer:
            raise UsageError(
                f"{path}: scored with tokenizer {header.tokenizer[:12]}, the student has {tokenizer[:12]}",
                hint="distributions need one tokenizer; distil on the teacher's text instead (score.kind = 'none')",
            )
        for name, tokens, targets in iter_targets(path):
            for at in places.get(tokens, ()):
                found[at] = targets
            scored.add(name)
    return found, scored


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what makes token ids: vocabulary, merges, normaliser and pre-tokenizer, added tokens (hex sha256)."""
    import hashlib

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        data = json.loads(backend.to_str())
        # Left over from the last call of the tokenizer: no part of how text becomes ids here.
        data.pop("padding", None)
        data.pop("truncation", None)
    else:
        data = {"vocab": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
