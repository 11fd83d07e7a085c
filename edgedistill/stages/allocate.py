"""allocate: choose the type of every matrix so that the file keeps a target's limits.

In: the table of ``sensitivity``, the full-precision GGUF (for what is not a matrix; a table of ONNX says that itself), what each
type costs on the target where that was measured. Out: ``types.json`` (the type of every matrix), ``front.json`` (size and
predicted KLD of the best choices for other sizes, speeds left aside).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from edgedistill.errors import UsageError
from edgedistill.fingerprint import Key
from edgedistill.step import Context, Stage, later
from edgedistill.target import format_size


@dataclass(frozen=True, kw_only=True)
class Allocate(Stage):
    """Choose for one size and ``speeds`` (``formats.gguf.speeds.figures``); two targets with the same limits share the entry."""

    name: ClassVar[str] = "allocate"
    model: Key
    sensitivity: Key
    size: int
    tool: str
    speeds: Mapping[str, Any] | None = later(None)

    def run(self, ctx: Context) -> Mapping[str, Any]:
        """Solve, and solve again for other sizes."""
        from edgedistill.formats.gguf.allocate import front, groups, overhead, solve
        from edgedistill.formats.gguf.read import read_info
        from edgedistill.formats.gguf.speeds import predict, speed_limit

        table = json.loads(ctx.path(self.sensitivity, "table.json").read_text())
        costs, shapes = table["costs"], table["shapes"]
        beside = table.get("beside")
        if beside is None:
            beside = overhead(read_info(ctx.path(self.model, "model.gguf")), costs)
        speeds = self.speeds or {}
        limits = [speed_limit(name, of, shapes) for name, of in speeds.items()]
        least = sum(min(size for size, _ in types.values()) for types in costs.values())
        if least + beside > self.size:
            raise UsageError(
                f"no choice of types makes a file of {format_size(self.size)}: the smallest has "
                f"{format_size(least + beside)}",
                "raise the size, or take a smaller model",
            )
        chosen = solve(costs, self.size - beside, limits, shapes)
        others = front(costs)
        (ctx.out / "types.json").write_text(json.dumps(chosen.types, indent=1))
        (ctx.out / "front.json").write_text(json.dumps([[one.nbytes + beside, one.kld] for one in others]))
        return {
            "allocate": {
                "size": chosen.nbytes + beside,
                "limit": self.size,
                "predicted_kld": chosen.kld,
                "proved": chosen.proved,
                "groups": groups(chosen.types, shapes),
                "front": [[one.nbytes + beside, one.kld] for one in others],
                "speeds": {
                    name: {
                        "predicted": predict(name, of, chosen.types, shapes),
                        "limit": of["least"],
                        "margin": of["margin"],
                        "unit": "tokens/s",
                    }
                    for name, of in speeds.items()
                },
            }
        }
