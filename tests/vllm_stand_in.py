"""What is started in vLLM's place where it is not installed: the same arguments, a real model behind a real HTTP server.

`python tests/vllm_stand_in.py -m vllm.entrypoints.openai.api_server --model DIR --port N …`; ``--crash`` and ``--sleep`` among the
arguments make it fail as vLLM can.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.model_server import ModelServer


def main() -> None:
    words = sys.argv[3:]
    given = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
    print("arguments", json.dumps(words), flush=True)
    if "--crash" in words:
        print("Traceback\nValueError: no GPU is that large\nbye", flush=True)
        sys.exit(7)
    if "--sleep" in words:
        time.sleep(600)
    if file := os.environ.get("STAND_IN_PIDS"):
        with Path(file).open("a") as out:
            out.write(f"{os.getpid()}\n")
    port = int(given["--port"])
    with ModelServer(Path(given["--model"]), given["--served-model-name"], dtype="float32", port=port) as server:
        server.most = int(given["--max-logprobs"])
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
