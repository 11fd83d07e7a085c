"""The turns of a trace in one sequence: each is learnt, and what stands between them, the results of tools, is not.

Turn k alone is a prompt (all that was recorded before it) and a completion. Where the prompt of turn k+1 begins with the
tokens of turn k, one forward over the last turn's sequence gives the same distributions at every turn's tokens, because
attention is causal: the losses are equal, and the work is that of one sequence instead of k. Where it does not (the teacher
wrote the call in other words than the record, or a chat template rewrites earlier turns) the turn stays a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgedistill.training.data import Example


def join_turns(examples: Sequence[Example]) -> list[Example]:
    """Put turns of one trace together, in their order; a token between two turns weighs 0 in every loss.

    The sum of all weights stays what it was, so no loss is divided by another number of tokens.
    """
    joined: list[Example] = []
    for one in examples:
        for at in reversed(range(len(joined))):
            before = joined[at]
            if one.prompt_ids[: before.length] == (*before.prompt_ids, *before.completion_ids):
                between = one.prompt_ids[before.length :]
                joined[at] = Example(
                    id=before.id,
                    prompt_ids=before.prompt_ids,
                    completion_ids=(*before.completion_ids, *between, *one.completion_ids),
                    evolution=before.evolution,
                    weights=(*before.token_weights, *(0.0 for _ in between), *one.token_weights),
                )
                break
        else:
            joined.append(one)
    return joined
