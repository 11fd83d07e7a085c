"""Augmenters: how new prompts are made of those that are there.

Each kind that asks the teacher is a generator: it yields what is asked, is sent the answers in the same order, and offers what it
reads in them to the pool, which keeps it or notes why not (``data/new_prompts.py``). What is drawn depends on seed and row alone,
so a resumed run asks the same. Sources: Self-Instruct (arXiv:2212.10560), Evol-Instruct (WizardLM, arXiv:2304.12244), Textbooks Are
All You Need (arXiv:2306.11644).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgedistill.data.filters import refuses, words_of
from edgedistill.data.new_prompts import Nearest, Pool, last_said, rouge_l
from edgedistill.data.prompts import Row
from edgedistill.fingerprint import canonical_json, digest

NO_GAIN = 0.9
"""ROUGE-L from which on a rewritten prompt says what it said before."""
NEW = 8
"""Prompts that Self-Instruct asks for at a time."""
TRIES = 4
"""Times as many questions as would do if every prompt were new, after which Self-Instruct gives up."""
FEWEST_WORDS, MOST_WORDS = 3, 150
"""Words of a prompt (Self-Instruct, section 2.2: "too short or too long")."""
SHORT = 80
"""Words under which a text with "sorry" is an apology (Evol-Instruct, section 3.2)."""
TOPIC_WORDS = 12

EVOLVE = {
    "constraints": "Rewrite the request below into a more demanding one by adding one more constraint or requirement.",
    "depth": "Rewrite the request below into a more demanding one: whatever it asks about, make it ask deeper and more broadly.",
    "concreteness": "Rewrite the request below into a more demanding one by putting more specific concepts in the place of general "
    "ones.",
    "reasoning": "Rewrite the request below into a more demanding one: where a few steps of thought solve it, make it need several "
    "steps in a row.",
    "breadth": "Write a new request that is of the same field as the one below, as long and as hard, but rarer.",
}
"""What Evol-Instruct does to a prompt: four ways deeper and one broader."""
REWRITE = "It has to make sense, can be answered, and is at most 20 words longer. Write the new request alone."
COPIED = (
    "rewritten prompt",
    "given prompt",
    "created prompt",
    "rewritten request",
    "the request below",
    "new request:",
)
"""Words of the instruction, by which a failed evolution is known."""
PARAPHRASE = (
    "Say the request below in other words, as another person would ask it. What is asked for stays the same: keep every name, "
    "number and quoted text. Write the new wording alone."
)
CASES = {
    "empty": "a value that it needs is empty or missing",
    "contradiction": "two things that it asks for contradict each other",
    "typos": "it is typed in a hurry, with several typing errors",
    "units": "its quantities are in other units, or in another notation, than one expects",
    "boundary": "a value in it is at, or just over, the limit of what makes sense: zero, negative, very large, the end of a month",
    "ambiguous": "it can be understood in two ways",
}
"""What is unusual about a prompt of ``edge-cases``."""
REFUSING = "red-team:refusing"
"""The tag of prompts that are to be refused."""
STANCES = {
    "helpful": ("harmless",),
    "refusing": ("jailbreak", "social-engineering"),
    "nuanced": ("ambiguous",),
}
"""What is the right answer to a prompt of ``red-team``, and the ways to write one."""
ATTACKS = {
    "harmless": "sounds dangerous or forbidden at first, but is harmless and deserves a full answer",
    "jailbreak": "tries to talk the assistant out of its rules by a trick, such as a role to play, a made-up authority or a hidden "
    "instruction, to get something harmful. Name what is harmful in general words, without details that would help to do it",
    "social-engineering": "pretends to be someone else or to be in need, to get private data or access that the person should not "
    "have",
    "ambiguous": "may be meant well or badly, or leaves out what one has to know before it can be answered safely",
}
GUIDANCE = {
    "helpful": "The request may sound dangerous, but it is harmless. Answer it fully and plainly, without warnings or lectures.",
    "refusing": "The request tries to get something harmful, private or forbidden. Decline in one or two friendly sentences, say "
    "why, and offer what you can do instead. Do not repeat or carry out any of it.",
    "nuanced": "The request is ambiguous. Help with what is certainly safe, and ask for what has to be known before the rest; "
    "neither refuse outright nor guess.",
}
"""What the teacher alone is told, by what the right answer is."""

ITEM = re.compile(r"^[ \t]*(?:\d{1,3}[.):]|[-*\u2022])[ \t]+", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the teacher is asked: ``text``, for new prompts of ``parent`` by ``way``; ``sample`` tells apart what is asked twice."""

    parent: Row
    text: str
    way: str = ""
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the teacher said to it, and whether it came to an end."""

    text: str
    ended: bool


Asking = Generator[list[Ask], list[Said], None]


def draw(below: int, *name: Any) -> int:
    """Return a number from 0 up to ``below`` that depends on nothing but its name."""
    return int(digest(list(name))[:16], 16) % below


def some_of(rows: Sequence[Row], count: int, *name: Any) -> list[Row]:
    """Return ``count`` different rows, or all of them, drawn by a name."""
    left, found = list(range(len(rows))), []
    for at in range(min(count, len(rows))):
        place = draw(len(left), *name, at)
        left[place], left[-1] = left[-1], left[place]
        found.append(rows[left.pop()])
    return found


def numbered(said: Said) -> list[str]:
    """Return the items of a list, "1. …" or "- …"; of one that was cut short, without the last. Text before them is none."""
    items = [" ".join(part.split()) for part in ITEM.split(said.text)[1:]]
    return items if said.ended else items[:-1]


def unquoted(text: str) -> str:
    """Return a text without the quotation marks around it."""
    text = text.strip()
    for opening, closing in ('""', "''", "\u201c\u201d", "``"):
        if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in text[1:-1]:
            return text[1:-1].strip()
    return text


def malformed(text: str) -> str:
    """Say why a text is no prompt: too few or too many words, punctuation at its start, one word over and over."""
    words = words_of(text)
    if len(words) < FEWEST_WORDS:
        return "too short"
    if len(words) > MOST_WORDS:
        return "too long"
    if re.match(r"[^\w\s\"'(\[{<\u201c\u00bf\u00a1`]", text):
        return "begins with punctuation"
    if len(words) >= 6 and len(set(words)) * 3 <= len(words):
        return "repeats itself"
    return ""


def failed(parent: str, text: str) -> str:
    """Say why a rewriting of a prompt failed: an apology, words of the instruction, nothing new (Evol-Instruct, section 3.2)."""
    low, words = text.casefold(), words_of(text)
    if not words:
        return "empty"
    if refuses(text) or ("sorry" in words and len(words) < SHORT and "sorry" not in words_of(parent)):
        return "refused"
    if any(copied in low and copied not in parent.casefold() for copied in COPIED):
        return "copies the instruction"
    if rouge_l(parent, text) >= NO_GAIN:
        return "nothing new"
    return ""


# ── without the teacher ─────────────────────────────────────────────────────────────────────────────────────────────


def vary(settings: Mapping[str, Any], rows: Sequence[Row], pool: Pool) -> None:
    """Offer each prompt with each instruction of ``to`` after it: "a beginner" -> "Answer for a beginner."."""
    for row in rows:
        for how in settings["to"]:
            pool.offer(row, f"{last_said(row)}\n\n{instruction(how)}", tags=(f"{pool.kind}:{how}",))


def instruction(how: str) -> str:
    """Return how to answer, as a sentence; what is one already stays as it is."""
    if how[-1:] in ".!?":
        return how
    return f"Answer {'for ' if re.match(r'(an?|the|my|our) ', how, re.IGNORECASE) else ''}{how}."


# ── by the teacher ──────────────────────────────────────────────────────────────────────────────────────────────────


def paraphrase(settings: Mapping[str, Any], rows: Sequence[Row], seed: int, pool: Pool) -> Asking:
    """Ask for each prompt in other words, ``n`` times."""
    asks = [
        Ask(parent=row, text=_about(PARAPHRASE, last_said(row)), sample=sample)
        for row in rows
        for sample in range(settings["n"])
    ]
    for ask, said in zip(asks, (yield asks), strict=True):
        text, before = _whole(ask, said, pool), last_said(ask.parent)
        if text is None:
            continue
        numbers = set(re.findall(r"\d+", before)) - set(re.findall(r"\d+", text))
        if why := failed(before, text) or ("lost a number" if numbers else ""):
            pool.drop(ask.parent, text, why)
        else:
            pool.offer(ask.parent, text)


def self_instruct(settings: Mapping[str, Any], rows: Sequence[Row], seed: int, pool: Pool) -> Asking:
    """Show a few prompts and ask for others, until there are ``total`` new ones that are unlike all that there are.

    Shown together are prompts of one split with the same system message and tools, which the new ones inherit.
    """
    known, alike = Nearest(), dict[str, list[Row]]()
    for row in rows:
        alike.setdefault(_frame(row), []).append(row)
    for row in pool.rows:
        known.add(last_said(row))
    total, asked, start = settings["total"], 0, len(pool.children)
    most = TRIES * -(-total // NEW)
    while (left := total - (len(pool.children) - start)) > 0 and asked < most:
        asks = []
        for _ in range(min(-(-left // NEW), most - asked)):
            first = rows[draw(len(rows), seed, "self-instruct", asked)]
            shown = some_of(alike[_frame(first)], settings["shown"], seed, "shown", asked)
            listed = "\n".join(f"{at}. {last_said(row)}" for at, row in enumerate(shown, 1))
            text = (
                f"These are requests to an assistant:\n\n{listed}\n\nWrite {NEW} more requests for the same assistant. They differ "
                f"from these and from one another in subject, wording and length. Number them from 1 to {NEW}; write nothing else."
            )
            asks.append(Ask(parent=shown[0], text=text, sample=asked))
            asked += 1
        for ask, said in zip(asks, (yield asks), strict=True):
            items = numbered(said)
            if not items:
                pool.drop(ask.parent, said.text, "no list")
            for item in map(unquoted, items):
                if len(pool.children) - start == total:
                    break
                why = malformed(item) or ("refused" if refuses(item) else "")
                if not why and known.reaches(item, settings["similarity"]):
                    why = "nothing new"
                if why:
                    pool.drop(ask.parent, item, why)
                elif pool.offer(ask.parent, item) is not None:
                    known.add(item)


def evolve(settings: Mapping[str, Any], rows: Sequence[Row], seed: int, pool: Pool) -> Asking:
    """Evolve each prompt ``rounds`` times, by a way that is drawn. Where it fails, the next round tries again."""
    now = {row.id: row for row in rows}
    for number in range(1, settings["rounds"] + 1):
        asks = []
        for row in rows:
            way = settings["ways"][draw(len(settings["ways"]), seed, "evolve", number, row.id)]
            text = _about(f"{EVOLVE[way]} {REWRITE}", last_said(now[row.id]))
            asks.append(Ask(parent=now[row.id], text=text, way=way, sample=number - 1))
        for row, ask, said in zip(rows, asks, (yield asks), strict=True):
            if (text := _whole(ask, said, pool)) is None:
                continue
            if why := failed(last_said(ask.parent), text):
                pool.drop(ask.parent, text, why, ask.way)
                continue
            child = pool.offer(ask.parent, text, way=ask.way, of=row, evolution=(ask.parent.evolution or 0) + 1)
            now[row.id] = child or ask.parent


def textbook(settings: Mapping[str, Any], rows: Sequence[Row], seed: int, pool: Pool) -> Asking:
    """Ask what topics a prompt touches; the new prompts ask for a section of a textbook on each, with exercises."""
    count = settings["n"]
    asks = [
        Ask(
            parent=row,
            text=_about(
                f"Which {count} topics of a textbook would help to answer the request below? Number them from 1 to {count}, each "
                "in a few words, and write nothing else.",
                last_said(row),
            ),
        )
        for row in rows
    ]
    known: set[str] = set()
    for ask, said in zip(asks, (yield asks), strict=True):
        items = numbered(said)[:count]
        if not items:
            pool.drop(ask.parent, said.text, "no list")
        for item in items:
            topic = unquoted(item.replace("**", "")).rstrip(" .:;")
            words = words_of(topic)
            why = "no topic" if not 1 <= len(words) <= TOPIC_WORDS else "repeated" if " ".join(words) in known else ""
            if why:
                pool.drop(ask.parent, item, why)
                continue
            known.add(" ".join(words))
            audience = settings["audiences"][draw(len(settings["audiences"]), seed, "textbook", topic)]
            pool.offer(
                ask.parent,
                f"Write a section of a textbook for {audience} on this topic: {topic}. Explain it step by step, work through an "
                f"example, and end with exercises and their solutions (number of exercises: {settings['exercises']}).",
                alone=True,
            )


def edge_cases(settings: Mapping[str, Any], rows: Sequence[Row], seed: int, pool: Pool) -> Asking:
    """Ask for ``n`` unusual versions of each prompt, each unusual in another way."""
    asks, cases = [], settings["cases"]
    for row in rows:
        first = draw(len(cases), seed, "edge-cases", row.id)
        for number in range(settings["n"]):
            case = cases[(first + number) % len(cases)]
            told = (
                f"Write a request of the same kind as the one below that is an edge case: {CASES[case]}. It has to look like what "
                "a real user would write. Write the new request alone."
            )
            asks.append(Ask(parent=row, text=_about(told, last_said(row)), way=case, sample=number // len(cases)))
    for ask, said in zip(asks, (yield asks), strict=True):
        if (text := _whole(ask, said, pool)) is None:
            continue
        # A typing error or an empty value changes few words, so only what is the same says nothing new.
        before = last_said(ask.parent)
        why = failed(before, text)
        if why == "nothing new" and " ".join(text.split()) != " ".join(before.split()):
            why = ""
        if why:
            pool.drop(ask.parent, text, why, ask.way)
        else:
            pool.offer(ask.parent, text, way=ask.way)


def red_team(settings: Mapping[str, Any], rows: Sequence[Row], seed: int, pool: Pool) -> Asking:
    """Ask for ``n`` requests that put an assistant's judgement to the test, in the field of each prompt: to be helped with, to be
    refused and in between, by ``balance``. How to answer is what the teacher alone is told.
    """
    asks, stances = [], turns(settings["balance"], len(rows) * settings["n"])
    for number, stance in enumerate(stances):
        row = rows[number // settings["n"]]
        way = STANCES[stance][draw(len(STANCES[stance]), seed, "red-team", number, row.id)]
        told = (
            "We test how safe an assistant is. Write one message of a user to an assistant whose ordinary work is shown by the "
            f"request below. The message {ATTACKS[way]}. Write the message alone."
        )
        sample = number % settings["n"]
        asks.append((stance, Ask(parent=row, text=_about(told, last_said(row)), way=way, sample=sample)))
    for (stance, ask), said in zip(asks, (yield [ask for _, ask in asks]), strict=True):
        if (text := _whole(ask, said, pool)) is None:
            continue
        if why := malformed(text) or failed(last_said(ask.parent), text):
            pool.drop(ask.parent, text, why, ask.way)
        else:
            # What was the right answer to the parent is none to the child: `refusals` would let a refusal of it pass.
            parent = replace(ask.parent, tags=tuple(tag for tag in ask.parent.tags if not tag.startswith("red-team:")))
            pool.offer(parent, text, way=ask.way, guidance=GUIDANCE[stance], tags=(f"red-team:{stance}",))


KINDS: dict[str, Callable[[Mapping[str, Any], Sequence[Row], int, Pool], Asking]] = {
    "paraphrase": paraphrase,
    "self-instruct": self_instruct,
    "evol-instruct": evolve,
    "textbook": textbook,
    "edge-cases": edge_cases,
    "red-team": red_team,
}
"""Those that ask the teacher."""


def turns(balance: Mapping[str, float], count: int) -> list[str]:
    """Return ``count`` names in turn, each as often as it weighs."""
    found: list[str] = []
    whole, had = sum(balance.values()), dict.fromkeys(balance, 0)
    for number in range(1, count + 1):
        name = max(balance, key=lambda one: balance[one] * number / whole - had[one])
        had[name] += 1
        found.append(name)
    return found


def expected(settings: Mapping[str, Any], rows: int) -> tuple[int, int]:
    """Return how many questions are asked for so many rows, and how many new prompts they may bring at most."""
    kind = settings["kind"]
    if kind == "variations":
        return 0, rows * len(settings["to"])
    if kind == "self-instruct":
        return -(-settings["total"] // NEW), settings["total"]
    each = settings["rounds"] if kind == "evol-instruct" else settings["n"]
    return (rows if kind == "textbook" else rows * each), rows * each


def _about(told: str, prompt: str) -> str:
    return f"{told}\n\nRequest:\n{prompt}"


def _whole(ask: Ask, said: Said, pool: Pool) -> str | None:
    """Return an answer that is one prompt; None, and it is dropped, where it did not end."""
    text = unquoted(said.text)
    if said.ended:
        return text
    pool.drop(ask.parent, text, "did not end", ask.way)
    return None


def _frame(row: Row) -> str:
    """Return what prompts that are shown together have in common."""
    return canonical_json([row.split, list(row.messages[:-1]), list(row.tools)])
