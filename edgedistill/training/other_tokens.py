"""A teacher with another tokenizer: it reads the same text in its own tokens.

Two ways to compare its distributions with the student's (``divergences.py``):

- ``uld``, universal logit distillation (Boizard et al. 2024, arXiv:2402.12030): the k-th token of a row's completion with the k-th
  of the teacher's, as far as both go, by the distance of the sorted probabilities: what the best transport costs between two
  distributions of which nobody knows which outcome is which.
- ``gold``, after GOLD (Patiño et al. 2025, TRL): where both have read the same part of the text, and there the tokens that both
  have one by one. Where one token of the student's is several of the teacher's or the other way round, GOLD multiplies
  probabilities into a distribution of the group, which does not add up to 1; here the first token of the group is compared,
  whose distributions answer the same question, and the rest of it is not.

A token of the student's to which no place of the teacher's belongs counts as nothing; a step's sum is divided by all its
completion tokens, as every loss here is. Sorting has its price: head and loss of 49,152 tokens each, 576 wide, take 9.0 ms a
completion token with ``uld``, 4.3 with ``gold`` where a fifth is not shared, and 1.6 with forward KL (one Zen 4 core, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from edgedistill.errors import UsageError
from edgedistill.training.data import Example, PaddedBatch, turn_end
from edgedistill.training.dense import DenseTargets, DenseTeacher
from edgedistill.training.packing import PackedBatch, causal_lm, make_batch, packable, read_beside

NONE = -1
"""In a list of places or of tokens: the teacher has none."""


class OtherTeacher(DenseTeacher):
    """A teacher that reads ``own``, the student's rows in its tokens. ``vocab_size`` is its tokenizer's.

    ``places`` are, for every completion token of each row of the student's, the number of the teacher's that it is compared
    with, or NONE. ``order`` are the teacher's tokens in the order of the student's, NONE for those that it does not have, and
    then its others; without it they are in their own.
    """

    reads_along: ClassVar[bool] = False

    def __init__(
        self,
        teacher: Any,
        vocab_size: int,
        own: Sequence[Example],
        places: Sequence[Sequence[int]],
        *,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__(teacher, vocab_size)
        self.own, self.places = own, places
        self.order = None if order is None else torch.as_tensor(order)

    def to(self, device: Any, dtype: torch.dtype) -> None:
        super().to(device, dtype)
        if self.order is not None and self._head is not None:
            (head, bias), order = self._head, self.order.to(device)
            there = order != NONE
            rows = order.clamp_min(0)
            offsets = torch.zeros(len(order), dtype=head.dtype, device=device) if bias is None else bias[rows]
            self._head = head[rows], offsets.masked_fill(~there, -torch.inf)

    def targets(
        self, batch: PackedBatch | PaddedBatch, rows: Sequence[int] = (), examples: Sequence[Example] = ()
    ) -> DenseTargets:
        """Run the teacher over its own tokens of some rows; ``batch`` is how the student reads them."""
        own = [self.own[row] for row in rows]
        states = read_beside(self.teacher, make_batch(own, packed=packable(causal_lm(self.teacher))), None)
        places, start = [], 0
        for row, one in zip(rows, own, strict=True):
            places += [NONE if place == NONE else start + place for place in self.places[row]]
            start += len(one.completion_ids)
        index = torch.tensor(places, device=states.device)
        assert self._head is not None  # to() comes first
        return DenseTargets(states[index.clamp_min(0)], *self._head, known=(index != NONE).float())


def other_teacher(
    teacher: Any,
    divergence: str,
    own: Sequence[Example],
    examples: Sequence[Example],
    texts: Sequence[str],
    tokenizers: tuple[Any, Any],
    vocab_size: int,
) -> OtherTeacher:
    """Make the teacher that ``divergence`` asks for. ``own`` and ``examples`` are the rows in its and the student's tokens,
    ``texts`` their completions, ``tokenizers`` its and the student's, ``vocab_size`` is the student's.

    Raises UsageError where the rows are not the same.
    """
    if [one.id for one in own] != [one.id for one in examples]:
        raise UsageError("the rows that the teacher reads are not the student's")
    theirs, tokenizer = tokenizers
    size = min(len(theirs), teacher.config.vocab_size)
    if divergence == "uld":
        places = [by_position(one, other) for one, other in zip(examples, own, strict=True)]
        return OtherTeacher(teacher, size, own, places)
    places = [by_text(ends_of(tokenizer, text), ends_of(theirs, text)) for text in texts]
    return OtherTeacher(teacher, size, own, places, order=in_order(tokenizer, vocab_size, theirs, size))


def by_position(student: Example, teacher: Example) -> list[int]:
    """Return for each completion token of a student the teacher's of the same number."""
    last = len(teacher.completion_ids)
    return [at if at < last else NONE for at in range(len(student.completion_ids))]


def ends_of(tokenizer: Any, text: str) -> list[int]:
    """Return where each token of a completion ends, in characters; the last is the token that ends the turn."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [*(end for _, end in found.offset_mapping), len(text) + 1]


def by_text(student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """Return for each token of a student, which end in these places, the teacher's that begins where it does.

    Tokens that are parts of one character all end where it does. Only before the first of them is it clear what was read.
    """
    starts = {start: at for at, (start, end) in enumerate(_spans(teacher)) if end > start}
    return [starts.get(start, NONE) if end > start else NONE for start, end in _spans(student)]


def _spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def in_order(tokenizer: Any, count: int, theirs: Any, their_count: int) -> list[int]:
    """Return the tokens of a teacher's tokenizer in the order of the student's: those of the same spelling, NONE where there
    is none, then the others. The tokens that end a turn are the same however they are spelt.
    """
    end, their_end = turn_end(tokenizer), turn_end(theirs)
    spelt = {spelling: number for spelling, number in _spelt(theirs, their_count).items() if number != their_end}
    order = [NONE] * count
    for spelling, number in _spelt(tokenizer, count).items():
        order[number] = spelt.get(spelling, NONE)
    order[end] = their_end
    used = set(order)
    return order + [number for number in range(their_count) if number not in used]


def _spelt(tokenizer: Any, count: int) -> dict[str, int]:
    """Return the first tokens by their spelling in a byte-level tokenizer; a SentencePiece one writes a space as U+2581."""
    found: dict[str, int] = {}
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(count))):
        if token is not None:
            found.setdefault(token.replace("\u2581", "\u0120"), number)
    return found
