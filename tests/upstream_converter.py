"""llama.cpp's own converter, from the sdist of the installed llama-cpp-python: fetched once, into the tests' cache."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

SENTENCEPIECE = "0.2.3"  # which it imports
_PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
# Its models register with the first import, so that one process converts many. It knows a byte-level tokenizer by the hash of
# the token ids of one text, which a made-up vocabulary cannot have: the name is given to it.
_RUN = """
import json, runpy, sys
converter, jobs = sys.argv[1], json.loads(sys.argv[2])
from conversion.base import TextModel
for folder, out, kind, pre in jobs:
    TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
    sys.argv = [converter, folder, "--outfile", out, "--outtype", kind]
    runpy.run_path(converter, run_name="__main__")
"""


def folder() -> Path:
    """Return the folder of the converter in the tests' cache."""
    cache = Path(os.environ.get("EDGEDISTILL_TEST_CACHE") or Path.home() / ".cache" / "edgedistill-tests").absolute()
    return cache / f"converter-{importlib.metadata.version('llama-cpp-python')}"


def fetch() -> str:
    """Fetch the converter where it is not there yet; return why it cannot be had, "" where it can."""
    if folder().is_dir():
        return ""
    folder().parent.mkdir(parents=True, exist_ok=True)
    with (folder().parent / "converter.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder().is_dir():
            return ""
        work = folder().with_suffix(".partial")
        shutil.rmtree(work, ignore_errors=True)
        version = importlib.metadata.version("llama-cpp-python")
        wanted = f"llama-cpp-python=={version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        commands = (
            [*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(work), wanted],
            [*pip, "install", "--no-deps", "--target", str(work / "site"), f"sentencepiece=={SENTENCEPIECE}"],
        )
        try:
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
                if done.returncode:
                    return f"llama.cpp's converter cannot be fetched: {done.stderr.strip()[-300:]}"
            archive = next(work.glob("*.tar.gz"))
            inside = f"llama_cpp_python-{version}/vendor/llama.cpp/"
            with tarfile.open(archive) as packed:
                for member in packed:
                    if member.name.startswith(tuple(inside + part for part in _PARTS)):
                        member.name = member.name.removeprefix(inside)
                        packed.extract(member, work, filter="data")
            archive.unlink()
            work.rename(folder())
        except (OSError, subprocess.TimeoutExpired, StopIteration) as error:
            return f"llama.cpp's converter cannot be fetched: {type(error).__name__}: {error}"
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return ""


def convert_upstream(jobs: Sequence[tuple[Path, Path, str, str]]) -> None:
    """Convert many models in one process: (HF folder, file to be, f32 | f16 | bf16, llama.cpp's name of the splitter) each."""
    home = folder()
    path = os.pathsep.join(str(part) for part in (home, home / "gguf-py", home / "site"))
    command = [sys.executable, "-c", _RUN, str(home / "convert_hf_to_gguf.py")]
    command.append(json.dumps([[str(model), str(out), kind, pre] for model, out, kind, pre in jobs]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
