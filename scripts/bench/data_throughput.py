"""Rows a second that reach the disk through a teacher behind a server, beside a plain client in an asyncio loop.

A server in a process of its own answers every chat after a fixed time, as many at once as are asked, so what is timed is the
client. Ours is the step `generate` as a build runs it: questions keyed, looked up, recorded before they are put, reserved in the
budget, each answer stored in SQLite when it arrives, and the view written. The peer is what people write by hand: httpx, a
semaphore, gather, and one JSONL file at the end, which a crash loses. Both speak with as many connections, turn by turn.

Two waits: 0, where the server does nothing and every microsecond of the client shows, and 100 ms, still less than a model takes.

Then the step `filter` over made-up answers, with every filter that needs no model, in a process of its own for its peak memory:
two sizes tell what an answer more takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
from _common import finish, machine_line, parser, say, table

from edgedistill.data.prompts import Row, rows_digest
from edgedistill.fingerprint import Key, digest
from edgedistill.rows import RowStore
from edgedistill.served import Abilities, Server
from edgedistill.spending import Budget
from edgedistill.stages.filter import Filter
from edgedistill.stages.generate import Generate
from edgedistill.step import Context
from edgedistill.store import Entry

PLACES, TOKENS = 64, 64
SAID = "The quick brown fox jumps over the lazy dog, and then goes home to write a longer answer about it. " * 3
LEAST = 0.5  # of the plain client's rows a second, where the server takes no time at all
FLAT = 350  # bytes that an answer more may take of the filter: 168 tell duplicates, the others where it lies; its text has 250


async def _serve(wait: float) -> None:
    """Answer chats over HTTP/1.1 until standard input ends; print the port."""
    usage = {"prompt_tokens": 20, "completion_tokens": TOKENS}
    choice = {"message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": usage}).encode()
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                if wait:
                    await asyncio.sleep(wait)
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def ours(rows: Sequence[Row], url: str, folder: Path) -> float:
    """Run the step `generate` in a new store; return its seconds."""
    entry = Entry.__new__(Entry)  # the step reads one thing of its teacher: the digest
    object.__setattr__(entry, "digest", digest("teacher"))
    teacher = Key(digest("the teacher's step"))
    server = Server(
        urls=(url,),
        model="m",
        key_env="X",
        concurrency=PLACES,
        timeout=60,
        retries=2,
        account="bench",
        budget=Budget(tokens=10**9),
        abilities=Abilities(),
    )
    stage = Generate(
        teacher=teacher,
        rows_digest=rows_digest(rows),
        style="answer",
        samples=1,
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=TOKENS,
        seed=0,
        rows=tuple(rows),
        batch_size=16,
        scores=None,
        min_score={},
        server=server,
    )
    (folder / "out").mkdir()
    (folder / "work").mkdir()
    context = Context(
        out=folder / "out",
        work=folder / "work",
        entries={teacher: entry},
        rows=RowStore(folder),
        threads=1,
        progress=lambda done, total, note: None,
        note=say,
    )
    # `path` of a teacher behind a server is asked for its weights, which nobody reads
    object.__setattr__(entry, "path", folder)
    started = time.perf_counter()
    facts = stage.run(context)
    taken = time.perf_counter() - started
    assert facts["asked"] == len(rows) == RowStore(folder).counts()["rows"]
    return taken


def plain(rows: Sequence[Row], url: str, folder: Path) -> float:
    """Ask as a script does; return its seconds."""

    async def run() -> None:
        places = asyncio.Semaphore(PLACES)
        limits = httpx2.Limits(max_connections=PLACES, max_keepalive_connections=PLACES)
        async with httpx2.AsyncClient(timeout=60, limits=limits) as client:

            async def ask(row: Row) -> dict[str, Any]:
                body = {"model": "m", "messages": list(row.messages), "max_tokens": TOKENS, "temperature": 0.0}
                async with places:
                    reply = (await client.post(url + "/chat/completions", json=body)).json()
                return {"id": row.id, "text": reply["choices"][0]["message"]["content"]}

            found = await asyncio.gather(*map(ask, rows))
        (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))

    started = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - started


def filtered(count: int) -> dict[str, float]:
    """Filter ``count`` answers by six filters; return seconds, and the most memory in bytes that it took on top of the rows."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(5000)]
    rows = tuple(
        Row(id=f"r{n}", messages=({"role": "user", "content": f"Add {words[n % 5000]} {n} to the list"},))
        for n in range(count)
    )
    suite = tuple(
        Row(id=f"s{n}", messages=({"role": "user", "content": " ".join(rng.choices(words, k=20))},))
        for n in range(1000)
    )
    common = {"metric": "json-exact", "otherwise": "drop"}
    filters = (
        {"kind": "format", "json_schema": json.dumps({"type": "object", "required": ["name", "arguments"]}), **common},
        {"kind": "format", "min_chars": 10, "max_chars": 1000, "pattern": "name", **common},
        {"kind": "refusals", **common},
        {"kind": "pii", **common},
        {"kind": "duplicates", **common},
        {"kind": "decontaminate", **common},
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").mkdir()
        with (folder / "rows.jsonl").open("w") as file:
            for n in range(count):
                text = json.dumps({"name": "add", "arguments": {"items": " ".join(rng.choices(words, k=25))}})
                line = {"id": f"r{n}", "row": f"k{n}", "sample": 0, "text": text, "finish": "stop", "logprob": -1.0}
                file.write(json.dumps(line) + "\n")
        answers = Key(digest("answers"))
        stage = Filter(answers=answers, rows_digest="", filters=filters, rows=rows, suites={"suite": suite})
        entry = Entry.__new__(Entry)
        object.__setattr__(entry, "path", folder)
        context = Context(
            out=folder / "out",
            work=folder,
            entries={answers: entry},
            rows=RowStore(folder),
            threads=1,
            progress=lambda done, total, note: None,
            note=say,
        )
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        before = resident("VmRSS")
        started = time.perf_counter()
        facts = stage.run(context)
        taken = time.perf_counter() - started
    assert facts["kept"] > 0.99 * count
    return {"seconds": taken, "memory": resident("VmHWM") - before}


def resident(name: str) -> float:
    """Return a figure of this process's memory (VmRSS: now; VmHWM: at most) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    """Measure."""
    arguments = parser(__doc__ or "", quick="400 rows, three rounds")
    arguments.add_argument("--serve", type=float, help="be the server, and wait so many seconds before each answer")
    arguments.add_argument("--filter", type=int, help="filter so many answers, and print what it took")
    given = arguments.parse_args()
    if given.filter is not None:
        print(json.dumps(filtered(given.filter)))
        return
    if given.serve is not None:
        asyncio.run(_serve(given.serve))
        return
    count, rounds = (400, 3) if given.quick else (5000, 5)
    rows = [
        Row(id=f"r{n}", messages=({"role": "user", "content": f"Tell me of fox number {n}."},)) for n in range(count)
    ]
    seconds: dict[tuple[float, str], list[float]] = {}
    for wait in (0.0, 0.1):
        command = [sys.executable, __file__, "--serve", str(wait)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin and server.stdout
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            for number in range(rounds):
                for name, run in (
                    (("ours", ours), ("plain", plain)) if number % 2 else (("plain", plain), ("ours", ours))
                ):
                    with tempfile.TemporaryDirectory() as folder:
                        seconds.setdefault((wait, name), []).append(run(rows, url, Path(folder)))
                say(f"wait {wait:g}: round {number + 1} of {rounds}")
            server.stdin.close()
    lines, ratios = [], {}
    for wait in (0.0, 0.1):
        rates = {name: median(count / one for one in seconds[wait, name]) for name in ("ours", "plain")}
        ratios[wait] = median(b / a for a, b in zip(seconds[wait, "ours"], seconds[wait, "plain"], strict=True))
        lines.append(
            [f"{1000 * wait:g} ms", *(f"{rates[name]:,.0f}" for name in ("ours", "plain")), f"{ratios[wait]:.2f}"]
        )
    table(
        f"rows a second, {count:,} rows, {PLACES} at a time, medians of {rounds}",
        ["the server takes", "ours, stored as they come", "plain client, kept in memory", "ratio"],
        lines,
    )
    sizes, filtering, memory = ((4000, 16_000) if given.quick else (10_000, 100_000)), [], []
    for size in sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--filter", str(size)], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)
        memory.append(found["memory"])
        filtering.append([f"{size:,}", f"{size / found['seconds']:,.0f}", f"{found['memory'] / 2**20:.1f} MiB"])
    table("six filters", ["answers", "a second", "memory on top of the rows"], filtering)
    more = (memory[1] - memory[0]) / (sizes[1] - sizes[0])
    print(f"an answer more takes {more:.0f} bytes: {'flat' if more <= FLAT else 'NOT flat'} (at most {FLAT})")
    print(
        f"peak memory of asking: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB (both in one process)"
    )
    print(machine_line(httpx2=httpx2.__version__, cpus=str(os.cpu_count())))
    finish(
        name="data_throughput",
        ours=round(median(count / one for one in seconds[0.0, "ours"])),
        peer=round(median(count / one for one in seconds[0.0, "plain"])),
        ratio=round(ratios[0.0], 3),
        unit="rows/s",
        n=rounds,
        wanted=f"at least {LEAST} of the plain client's rate where the server takes no time, 0.95 where it takes 100 ms; an answer "
        f"more takes at most {FLAT} bytes of the filter",
        holds=ratios[0.0] >= LEAST and ratios[0.1] >= 0.95 and more <= FLAT,
        filter_bytes_an_answer=round(more),
        slow_server_ratio=round(ratios[0.1], 3),
    )


if __name__ == "__main__":
    main()
