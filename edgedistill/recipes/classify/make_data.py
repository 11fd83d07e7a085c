"""Make the data of the recipe ``classify``: short messages to a shop, each with the queue that it belongs to.

    python -m edgedistill.recipes.classify.make_data [--check] [--out DIR]

Some wordings belong to one queue. Others are ambiguous: "I was charged and nothing came" is a matter of payment to some who sort
messages and of delivery to others. The generator knows the share of each queue; the reference is drawn from it, as the label of one
person would be, and the shares stand in the row as ``shares``, which nothing is trained on. So the best accuracy is under 1, and
a student that is sure of ambiguous messages is too sure. ``train``, ``dev`` and ``holdout`` share their wordings and differ in
things, days, names and numbers; ``ood`` has wordings that train never saw. No message stands in two files. The same seed makes the
same bytes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill.recipes.files import as_jsonl, write_or_check

HERE = Path(__file__).parent
SEED = 20261127
SIZES = {"train": 1600, "dev": 160, "holdout": 420, "ood": 420}
LABELS = ("delivery", "refund", "billing", "account", "technical", "product", "cancel")
SYSTEM = f"Sort the message into one queue: {', '.join(LABELS)}. Answer with the queue alone."

THINGS = (
    *("kettle", "lamp", "desk chair", "backpack", "headphones", "coffee grinder", "blender", "keyboard", "rug", "tent"),
    *("bike light", "raincoat", "speaker", "toaster", "watch", "monitor"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "last week", "the weekend")
OPENERS = ("", "", "", "Hi, ", "Hello, ", "Good morning, ", "Quick question: ", "Urgent: ", "Sorry to bother you, ")
ENDINGS = (
    "",
    "",
    "",
    " Thanks.",
    " Please help.",
    " Order {number}.",
    " My order number is {number}.",
    " Regards, {name}",
)
NAMES = ("Mara", "Ivo", "Lena", "Tom", "Aisha", "Felix", "Nora", "Omar", "Pia", "Jan", "Rosa", "Ken", "Zoe", "Paul")

Wording = tuple[str, dict[str, float]]
"""A wording, and the share of those who sort messages that put it into each queue."""


def _one(label: str, *texts: str) -> list[Wording]:
    return [(text, {label: 1.0}) for text in texts]


TAUGHT: tuple[Wording, ...] = (
    *_one(
        "delivery",
        "where is my {thing}? It was to come on {day}.",
        "the courier left my {thing} with a neighbour I do not know.",
        "can you bring the {thing} on {day} instead?",
        "tracking has said the same since {day}.",
    ),
    *_one(
        "refund",
        "I sent the {thing} back on {day} and want my money.",
        "when do I get the money for the {thing} that I returned?",
        "how do I return the {thing}? I want my money back.",
    ),
    *_one(
        "billing",
        "my card was charged twice for one {thing}.",
        "I need an invoice for the {thing}.",
        "the price on the bill for the {thing} is not the one I saw on {day}.",
    ),
    *_one(
        "account",
        "I cannot change the email address of my account.",
        "please delete my account and all data, {name} from {day}.",
        "I forgot my password and no mail has come since {day}.",
    ),
    *_one(
        "technical",
        "the app closes whenever I open the page of the {thing}.",
        "since {day} your site shows an error when I search for a {thing}.",
        "the button to pay does nothing for the {thing}, whichever browser I take.",
    ),
    *_one(
        "product",
        "how long is the cable of the {thing}?",
        "does the {thing} come in green?",
        "is the {thing} safe to wash?",
    ),
    *_one(
        "cancel",
        "please stop the order of the {thing}, I changed my mind.",
        "cancel my {thing}, I found it cheaper on {day}.",
    ),
    ("I was charged for the {thing} on {day} and nothing came.", {"delivery": 0.5, "billing": 0.3, "refund": 0.2}),
    ("the {thing} came broken on {day}.", {"refund": 0.55, "delivery": 0.25, "product": 0.2}),
    ("the {thing} is late, I do not want it any more.", {"cancel": 0.55, "refund": 0.25, "delivery": 0.2}),
    ("I cannot log in to see my {thing}.", {"account": 0.6, "technical": 0.4}),
    ("payment for the {thing} failed on {day}.", {"billing": 0.5, "technical": 0.5}),
    ("my {thing} does not turn on.", {"product": 0.5, "technical": 0.3, "refund": 0.2}),
    ("I got the wrong {thing}.", {"delivery": 0.5, "refund": 0.5}),
    ("I no longer need the {thing}, what now?", {"cancel": 0.5, "refund": 0.5}),
)
NEVER_TAUGHT: tuple[Wording, ...] = (
    *_one(
        "delivery", "still waiting for the {thing}, {day} has passed.", "your driver did not ring on {day}, no {thing}."
    ),
    *_one(
        "refund",
        "the {thing} is on its way back to you, please pay me out.",
        "I handed the {thing} in on {day}, where is my cash?",
    ),
    *_one(
        "billing",
        "there are two payments for a single {thing} on my statement.",
        "send me a receipt for the {thing}, please.",
    ),
    *_one(
        "account", "someone else got into my profile on {day}.", "I have a new phone number, {name}, how do I save it?"
    ),
    *_one(
        "technical",
        "I only get a white screen when I look at the {thing}.",
        "the app freezes at the basket with the {thing}.",
    ),
    *_one("product", "what is the {thing} made of?", "how heavy is the {thing}?"),
    *_one("cancel", "do not send the {thing}.", "I ordered the {thing} by mistake, call it off."),
    ("money for the {thing} left my bank on {day}, but no parcel.", {"delivery": 0.5, "billing": 0.3, "refund": 0.2}),
    ("there is a crack in the {thing} that was brought on {day}.", {"refund": 0.55, "delivery": 0.25, "product": 0.2}),
    ("it took too long, keep the {thing}.", {"cancel": 0.55, "refund": 0.25, "delivery": 0.2}),
    ("the sign-in page throws me out, I wanted the {thing}.", {"account": 0.6, "technical": 0.4}),
    ("checkout refuses my card for the {thing}.", {"billing": 0.5, "technical": 0.5}),
    ("the {thing} stays dark whatever I press.", {"product": 0.5, "technical": 0.3, "refund": 0.2}),
    ("this is not the {thing} that I chose.", {"delivery": 0.5, "refund": 0.5}),
)


def make_row(wording: Wording, rng: random.Random) -> dict[str, Any]:
    """Fill one wording, and draw the queue that one person would put it into."""
    text, shares = wording
    words = {"thing": rng.choice(THINGS), "day": rng.choice(DAYS), "name": rng.choice(NAMES)}
    words["number"] = str(rng.randint(10_000, 99_999))
    message = (rng.choice(OPENERS) + text + rng.choice(ENDINGS)).format(**words)
    message = message[0].upper() + message[1:]
    (label,) = rng.choices(list(shares), weights=list(shares.values()))
    return {
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}],
        "reference": label,
        "shares": shares,
        "tags": ["clear" if len(shares) == 1 else "ambiguous"],
    }


def make_all() -> dict[str, list[dict[str, Any]]]:
    """Make every file's rows; no message stands in two files, or twice in one."""
    rng, seen = random.Random(SEED), set()
    files: dict[str, list[dict[str, Any]]] = {}
    for name, size in SIZES.items():
        rows: list[dict[str, Any]] = []
        wordings = NEVER_TAUGHT if name == "ood" else TAUGHT
        while len(rows) < size:
            row = make_row(wordings[len(rows) % len(wordings)], rng)
            if (text := row["messages"][1]["content"]) in seen:
                continue
            seen.add(text)
            rows.append({"id": f"{name}-{len(rows):04d}", **row})
        files[name] = rows
    return files


def rendered() -> dict[str, bytes]:
    """Render every file: path relative to the recipe's folder -> bytes."""
    return as_jsonl(make_all())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check compare them; return 1 where one differs."""
    return write_or_check(rendered, HERE, prog="edgedistill.recipes.classify.make_data", argv=argv)


if __name__ == "__main__":
    sys.exit(main())
