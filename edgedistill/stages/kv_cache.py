"""kv-cache: the types of a target's KV cache, and what they cost at the context length that it promises.

In: the quantized file, the tokens that ``calibrate`` ran, the target's context. Out: ``kv_cache.json``: the types, and how far the
file's distributions are from those with an f16 cache at the end of rows as long as the context. Of several types the first is
taken with which the process keeps to ``limits.peak_rss``: its memory is measured here, as `measure` does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.fingerprint import Key
from edgedistill.kv_cache import F16, Pair, told
from edgedistill.step import Context, Stage
from edgedistill.target import format_size


@dataclass(frozen=True, kw_only=True)
class KvCache(Stage):
    """Choose, where there is a choice, and compare with f16. ``types`` are tried in their order."""

    name: ClassVar[str] = "kv-cache"
    model: Key
    text: Key
    context: int
    types: tuple[Pair, ...]
    peak_rss: int | None  # what the process may take; None: the types are given
    threads: int
    build: str
    isa: str

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Measure memory, take the types, compare."""
        from edgedistill.evals.kv_cache import compare_caches

        gguf = ctx.path(self.model, "model.gguf")
        kv, memory = self._choose(ctx)
        found: dict[str, Any] = {"k": kv[0], "v": kv[1]}
        if kv != F16:
            texts = json.loads(ctx.path(self.text, "tokens.json").read_text())
            found |= compare_caches(gguf, texts, self.context, kv, threads=ctx.threads, progress=ctx.progress)
            kld, top1 = found["kld"], found["top1"]
            ctx.note(
                f"KV cache in {told(kv)}: KLD {kld['value']:.3g} [{kld['low']:.3g}, {kld['high']:.3g}] nats a token from f16 at "
                f"{found['context']} tokens (rounding alone: {found['rounding']['value']:.3g}), first choices agree "
                f"{top1['value']:.1%}"
            )
        (ctx.out / "kv_cache.json").write_text(json.dumps(found, indent=1, sort_keys=True))
        return {"kv_cache": {**found, "peak_rss": memory}}

    def _choose(self, ctx: Context) -> tuple[Pair, dict[str, int]]:
        """Return the types, and the peak memory with each that was tried, f16 among them."""
        memory = {}
        for kv in dict.fromkeys((F16, *self.types)):
            memory[told(kv)] = self._memory(ctx, kv)
            if kv in self.types and (self.peak_rss is None or memory[told(kv)] <= self.peak_rss):
                return kv, memory
        kv = self.types[-1]
        ctx.note(
            f"no type of the KV cache keeps to limits.peak_rss = {format_size(self.peak_rss or 0)}: the process takes "
            f"{format_size(memory[told(kv)])} even in {told(kv)}"
        )
        return kv, memory

    def _memory(self, ctx: Context, kv: Pair) -> int:
        from edgedistill.devices.local import Settings, Worker

        with Worker(ctx.path(self.model, "model.gguf"), self.threads, kv=kv) as worker:
            return int(worker.ask("fill", context=self.context, prompt=Settings(threads=self.threads).pp)["peak_rss"])
