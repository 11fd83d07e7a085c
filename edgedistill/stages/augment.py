"""augment: make new prompts of those that are there.

In: the rows of the recipe, or the entry of the augmenter before; where the teacher writes, the teacher. Out: ``prompts.jsonl``,
all rows, the new ones last, each with the row that it comes of (``seed_id``) and its split; ``dropped.jsonl``, what is not used and
why. The teacher is asked as `generate` asks it: what it said is in the row store, and nobody asks it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.data.augmenters import KINDS, Said, vary
from edgedistill.data.new_prompts import Pool, last_said
from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.errors import StepFailed
from edgedistill.fingerprint import Key
from edgedistill.stages.generate import Generate
from edgedistill.step import Context, Stage, rows_given, unkeyed


@dataclass(frozen=True, kw_only=True)
class Vary(Stage):
    """Put an instruction after each prompt; nobody is asked. ``settings`` are the table's, ``tested`` the digests of the suites."""

    name: ClassVar[str] = "augment"
    prompts: Key | None
    rows_digest: str
    settings: Mapping[str, Any]
    tested: Mapping[str, str]
    rows: tuple[Row, ...] = unkeyed()
    suites: Mapping[str, tuple[Row, ...]] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Write the rows."""
        rows = rows_given(ctx, self.prompts, self.rows)
        pool = Pool(self.settings["kind"], rows, self.suites)
        vary(self.settings, parents(self.settings, rows, self.rows), pool)
        return written(ctx, pool)


@dataclass(frozen=True, kw_only=True)
class Augment(Generate):
    """Have the teacher write prompts. It is asked in turns where one depends on the answers to the one before."""

    name: ClassVar[str] = "augment"
    settings: Mapping[str, Any]
    tested: Mapping[str, str]
    suites: Mapping[str, tuple[Row, ...]] = unkeyed()

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Prove the teacher, ask it, keep what is new."""
        self._prove(ctx)
        rows, kind = rows_given(ctx, self.prompts, self.rows), self.settings["kind"]
        pool = Pool(kind, rows, self.suites)
        asking = KINDS[kind](self.settings, parents(self.settings, rows, self.rows), self.seed, pool)
        counts, waited = Counter(asked=0, from_store=0, tokens=0), 0.0
        asks = next(asking, None)
        while asks is not None:
            questions = self._questions(ctx, [((("user", ask.text),), ask.sample) for ask in asks])
            put = self._ask_missing(ctx, questions, [ask.parent.id for ask in asks])
            waited += put.waited
            stored = ctx.rows.get(question.key for question in questions)
            answers = [stored[question.key] for question in questions]
            tokens = sum(one.count for one in answers)
            counts.update(asked=put.count, from_store=len(questions) - put.count, tokens=tokens)
            said = [Said(text=split(one.text).answer.strip(), ended=one.finish == "stop") for one in answers]
            try:
                asks = asking.send(said)
            except StopIteration:
                asks = None
        return {**written(ctx, pool), **counts, **({"waited": round(waited, 1)} if waited else {})}


def parents(settings: Mapping[str, Any], rows: tuple[Row, ...], own: tuple[Row, ...]) -> list[Row]:
    """Return the rows that new prompts are made of: those that end with a user's words, evenly spaced ones where only some are
    wanted. ``own`` are the recipe's.
    """
    known = {row.id for row in own}
    found = [row for row in rows if last_said(row).strip() and (settings.get("of") != "files" or row.id in known)]
    count = min(settings.get("rows") or len(found), len(found))
    return [found[at * len(found) // count] for at in range(count)]


def written(ctx: Context, pool: Pool) -> dict[str, Any]:
    """Write what the pool holds, and return its figures. Raises StepFailed where nothing new came of it."""
    (ctx.out / "prompts.jsonl").write_text(pool.lines())
    (ctx.out / "dropped.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in pool.dropped))
    new, dropped = len(pool.children), pool.reasons()
    if not new:
        told = ", ".join(f"{count} x {why}" for why, count in sorted(dropped.items(), key=lambda pair: -pair[1]))
        example = f"; the first: {pool.dropped[0]['text'][:80]!r}" if pool.dropped else ""
        raise StepFailed(
            f"{pool.kind} brought no new prompt: {told or 'nothing was written'}{example}",
            "a small teacher may not be able to: take another kind of augmenter, or leave the table out; answers are kept",
        )
    yields = [{"filter": f"augment {pool.kind}", "in": new + len(pool.dropped), "out": new}]
    return {"prompts": len(pool.rows) + new, "new": new, "dropped": dropped, "yields": yields}
