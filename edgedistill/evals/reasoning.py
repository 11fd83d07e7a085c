"""Problems of reasoning-gym and the verdicts of its verifiers (https://github.com/open-thought/reasoning-gym, Apache-2.0).

It makes problems from seeds, offline, and judges answers by rules of each task: "1,000.00" is 1000, a palindrome is any that uses
the letters. A row carries what was made, in the field ``reasoning_gym``, for its verifier to read. An optional dependency
(``pip install 'edgedistill[reasoning]'``), imported only here.

Some of its verifiers run the answer through Python's ``eval``, and a model's answer must never be run: ``TASKS`` is a closed list
of those that do not, as read in 0.1.25.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from edgedistill.errors import UsageError

ROWS, SEEDS = 2**20, 2**11  # together what 32 bits of numpy's seeds hold, with a sign
INSTALL = "pip install 'edgedistill[reasoning]'"
TASKS = (
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "count_bits",
    "decimal_chain_sum",
    "dice",
    "fraction_simplification",
    "gcd",
    "gsm_symbolic",
    "lcm",
    "leg_counting",
    "letter_counting",
    "number_filtering",
    "number_format",
    "palindrome_generation",
    "power_function",
    "prime_factorization",
    "products",
    "simple_equations",
    "spell_backward",
    "syllogism",
    "time_intervals",
    "word_sequence_reversal",
    "word_sorting",
)


def installed() -> bool:
    """Tell whether the library is there, without importing it."""
    return find_spec("reasoning_gym") is not None


def _library() -> Any:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise UsageError(f"reasoning-gym cannot be imported ({error})", INSTALL) from None
    return reasoning_gym


def check_entry(entry: Any) -> str:
    """Return the task of a problem. Raises UsageError for what is none, and for a task outside ``TASKS``."""
    metadata = entry.get("metadata") if isinstance(entry, Mapping) else None
    task = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not isinstance(task, str) or not isinstance(entry.get("answer"), str):
        raise UsageError(
            "reasoning_gym must be what the library made: question, answer, and metadata with source_dataset",
            "make rows with: edgedistill data make TASK",
        )
    return _known(task)


def _known(task: str) -> str:
    if task in TASKS:
        return task
    close = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"{task!r} is no task that is verified here: of reasoning-gym's verifiers only those that never run an answer are",
        f"{hint}Tasks: {', '.join(TASKS)}.",
    )


def credit(answer: str, entry: Mapping[str, Any]) -> float:
    """Return what the verifier of the problem gives to an answer; exactly 1 is right, less is a part of it. One that fails on an
    answer (some do on what is no number) gives 0. Raises UsageError as ``check_entry``, and for a problem on which it fails
    whatever the answer.
    """
    verifier = _verifier(check_entry(entry))
    try:
        return float(verifier(answer.strip(), entry))
    except Exception as error:  # whatever a verifier raises, about an answer of any form
        if answer == entry["answer"]:
            raise UsageError(
                f"reasoning-gym cannot judge a problem of {check_entry(entry)}: {error!r}", "make the rows anew"
            ) from None
        credit(entry["answer"], entry)
        return 0.0


@functools.cache
def _verifier(task: str) -> Any:
    return _library().get_score_answer_fn(task)


def make_rows(task: str, rows: int, seed: int, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield rows of a task: id, prompt, reference, tags and the problem. The same arguments make the same rows; of two seeds,
    0 to ``SEEDS`` - 1, no two rows are drawn alike (that two small problems are the same, ``plan`` tells).

    ``settings`` are the task's own (``max_terms``, …). Raises UsageError for a task or setting that there is not, and for a
    problem whose own answer is not right once it has been through JSON.
    """
    library = _library()
    try:
        # Its problem number n of seed s is that of number n - 1 of seed s + 1: our seeds lie further apart than files are long.
        made = library.create_dataset(_known(task), size=rows, seed=seed * ROWS, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"reasoning-gym refuses these settings of {task}: {error}", "correct --set") from None
    for number in range(rows):
        entry = json.loads(json.dumps(made[number], default=str))  # gsm_symbolic's variables may be fractions
        if credit(entry["answer"], entry) != 1.0:
            raise UsageError(f"problem {number} of {task}: its own answer is not right", "take another task or seed")
        yield {
            "id": f"{task}-{seed}-{number}",
            "prompt": entry["question"],
            "reference": entry["answer"],
            "tags": [task],
            "reasoning_gym": entry,
        }
