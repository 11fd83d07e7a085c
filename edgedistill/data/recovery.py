"""Which prompts the teachers failed so far, and what a teacher that answers them anew brings, easy ones and hard ones apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

UNWANTED = ("duplicates", "decontaminate", "pii")
"""Filters whose rejected rows are taught by nobody's text: there is nothing wrong with the teacher."""
NO_TEACHER = ("gold", "hedge")
"""Sources of kept rows that no teacher wrote."""


def failed_prompts(
    prompts: Iterable[str], kept: Iterable[Mapping[str, Any]], rejected: Iterable[Mapping[str, Any]]
) -> set[str]:
    """Return the ids of prompts that were answered, and by no answer that was kept; without those that are not to be taught.

    ``kept`` and ``rejected`` are the lines that a filter wrote. A second text that was kept for a prompt has the id ``ID#1``.
    """
    names, tried = set(prompts), set()
    for line in rejected:
        tried.add(line["id"])
        if str(line["why"]).partition(":")[0] in UNWANTED:
            names.discard(line["id"])
    for line in kept:
        if line["source"] not in NO_TEACHER:
            names.discard(line["id"])
    return names & tried
