"""Run the filter over made-up answers in a process of its own, in the current folder, and print the bytes that it took at most:
``python -m tests.unit.stages.filter_peak ANSWERS CHARACTERS DUPLICATES``.
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgedistill.data.prompts import Row
from edgedistill.fingerprint import Key
from edgedistill.stages.filter import Filter

SAMPLES = 2


def main(count: int, characters: int, duplicates: bool) -> None:
    """Write answers of so many characters, two to a prompt, and filter them."""
    rng = np.random.Generator(np.random.Philox(0))
    rows = tuple(
        Row(id=f"r{at}", messages=({"role": "user", "content": f"say {at}"},), reference="x")
        for at in range(count // SAMPLES)
    )
    answers, grades = Key("a" * 64), Key("b" * 64)
    size = 0
    with Path("rows.jsonl").open("w") as file, Path("grades.jsonl").open("w") as graded:
        for at in range(count):
            words = rng.integers(0, 5000, characters // 6)
            text = " ".join(f"w{word:04d}" for word in words) + (" mail jane@acme-corp.com" if at % 10 == 0 else "")
            size += len(text)
            line = {"id": f"r{at // SAMPLES}", "row": f"{at:064d}", "text": text, "finish": "stop", "logprob": -1.0}
            file.write(json.dumps(line) + "\n")
            graded.write(json.dumps({"row": line["row"], "grade": 0.5}) + "\n")
    common = {"metric": "exact", "otherwise": "gold"}
    filters: tuple[dict[str, Any], ...] = (
        {"kind": "format", "min_chars": 10, **common},
        {"kind": "pii", **common},
        {"kind": "perplexity", "max": 0.9, "grades": grades, **common},
        *([{"kind": "duplicates", **common}] if duplicates else []),
    )
    Path("out").mkdir()
    stage = Filter(answers=answers, rows_digest="", filters=filters, rows=rows)
    ctx: Any = SimpleNamespace(progress=lambda *_: None, out=Path("out"), path=lambda _key, name: Path(name))
    gc.collect()
    tracemalloc.start()
    facts = stage.run(ctx)
    peak = tracemalloc.get_traced_memory()[1]
    print(json.dumps({"answers": count, "text": size, "kept": facts["kept"], "peak": peak}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
