"""The student as a writer, for on-policy distillation."""

from __future__ import annotations

from typing import Any

from edgedistill.errors import UsageError
from edgedistill.training.data import turn_end
from edgedistill.training.on_policy import OnPolicy
from edgedistill.training.packing import packable


def student_writer(model: Any, tokenizer: Any, vocab_size: int) -> OnPolicy:
    """Return how a model in training writes: by our decoder, until the end of the turn. Raises UsageError for a model that
    flat batches do not fit: our decoder has no other way.
    """
    from edgedistill.teachers.decode import decode

    if not packable(model):
        raise UsageError(
            f"distill.on_policy: models of the kind {model.config.model_type!r} cannot write while they are trained",
            "set distill.on_policy = 0",
        )
    end = turn_end(tokenizer)
    eos = model.generation_config.eos_token_id
    stops = {end} | (set() if eos is None else set(eos) if isinstance(eos, list) else {eos})
    return OnPolicy(decode=decode, stop_ids=tuple(sorted(stops)), end=end, vocab_size=vocab_size)
