"""A build's way to ask in batches, as a process that can be killed: `python -m tests.batch_client`, and what it asks as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgedistill.rows import Answered, RowStore
from edgedistill.served import Batching, Server
from edgedistill.spending import Budget
from edgedistill.teachers import batches
from edgedistill.teachers.openai import OpenAITeacher
from edgedistill.teachers.protocol import Answer, Sampling


def server(
    url: str,
    *,
    requests: int = 50_000,
    retries: int = 3,
    account: str = "a",
    poll: float = 0.01,
    timeout: float = 10.0,
    **budget: Any,
) -> Server:
    return Server(
        urls=(url,),
        model="m",
        key_env="NO_SUCH_KEY",
        concurrency=4,
        timeout=timeout,
        retries=retries,
        account=account,
        budget=Budget(**budget),
        batch=Batching(requests=requests, window="24h", poll=poll, share=0.5),
    )


def start(folder: Path, url: str, rows: range, **asks: Any) -> subprocess.Popen[str]:
    """Start a client that asks some rows; its notes come line by line."""
    told = {"folder": str(folder), "url": url, "rows": [rows.start, rows.stop], **asks}
    command = [sys.executable, "-m", "tests.batch_client", json.dumps(told)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ask(folder: str, url: str, rows: list[int], **asks: Any) -> None:
    """Ask what is not stored, and store it, as the step `generate` does."""
    batches.CREATING_S, batches.OTHERS_S = 2.0, 0.1
    stored = RowStore(Path(folder))
    names = [name for row in range(*rows) if not stored.known([name := f"r{row}"])]

    def store(answers: list[Answer]) -> None:
        stored.add_by_key(
            "t", [Answered(key=one.row_id, text=one.text, token_ids=(), finish="stop", logprob=0.0) for one in answers]
        )

    with OpenAITeacher(
        server(url, **asks),
        rows=stored.path,
        batched=True,
        note=lambda text: print(text, flush=True),
        on_others=store,
    ) as teacher:
        prompts = [[{"role": "user", "content": f"Question {name[1:]}"}] for name in names]
        list(teacher.generate(prompts, sampling=Sampling(max_new_tokens=10), row_ids=names, on_batch=store))


if __name__ == "__main__":
    ask(**json.loads(sys.argv[1]))
