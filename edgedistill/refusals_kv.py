"""What can be refused of a target's KV cache before anything runs, and what it takes of the target's memory."""

from __future__ import annotations

from edgedistill.errors import RecipeError
from edgedistill.kv_cache import BLOCK, CHOICES, F16, Pair, cache_bytes, told
from edgedistill.model_facts import ModelFacts
from edgedistill.target import AUTO, Target, format_size


def refuse_kv(target: Target, facts: ModelFacts, size: int) -> list[str]:
    """Raise RecipeError for types that the heads of the model do not have, and for "auto" where no type keeps to the target's
    memory; return what the cache takes, where that is worth a word. ``size`` is the estimated bytes of the file.
    """
    kv, context, limit = target.kv, target.runtime.context, target.limits.peak_rss
    took = {pair: cache_bytes(facts, context, pair) for pair in (CHOICES if kv == AUTO else (F16, kv))}
    if kv != F16 and facts.head % BLOCK:
        raise RecipeError(
            f"the model's heads have {facts.head} dimensions, and types other than f16 pack {BLOCK} of them in a block",
            'set kv_cache = "f16"',
            file=target.path,
            key="runtime.kv_cache",
        )
    found = [] if kv == F16 else [f"a KV cache of {context} tokens takes about {_listed(took)}"]
    least = min(took.values()) if kv == AUTO else took[kv]
    if limit is not None and size + least > limit:
        over = f"a file of about {format_size(size)} and a KV cache of {context} tokens, {format_size(least)} in "
        over += f"{told(CHOICES[-1] if kv == AUTO else kv)}, are over limits.peak_rss = {format_size(limit)}"
        if kv == AUTO:
            hint = "promise less context, take a smaller student or type, or raise the limit"
            raise RecipeError(over, hint, file=target.path, key="runtime.kv_cache")
        smallest = cache_bytes(facts, context, CHOICES[-1])
        helps = kv == F16 and not facts.head % BLOCK and size + smallest <= limit
        found.append(
            over + (f'; runtime.kv_cache = "auto" can bring it down to {format_size(smallest)}' if helps else "")
        )
    if kv != F16 and facts.context and context > facts.context:
        found.append(f"its cost is measured at {facts.context} tokens, the model's own context, not at {context}")
    return found


def _listed(took: dict[Pair, int]) -> str:
    return ", ".join(f"{format_size(size)} in {told(kv)}" for kv, size in took.items())
