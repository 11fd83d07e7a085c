"""llama.cpp's own HTTP server (as xllamacpp builds it), in a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def llama_server(model: Path, *, alias: str, context: int = 2048, places: int = 4) -> Iterator[str]:
    """Serve a GGUF file as ``alias`` during the ``with`` block; give the address up to its /v1."""
    command = [sys.executable, __file__, str(model), alias, str(context), str(places)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), "llama.cpp's server did not start"
        try:
            yield f"{address}/v1"
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def _serve(model: str, alias: str, context: int, places: int) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")  # its stubs name nothing
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.model_alias = model, {alias}
    parameters.n_ctx, parameters.n_parallel = context, places
    parameters.cpuparams.n_threads = 2
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until whoever started it is done, or dead


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
