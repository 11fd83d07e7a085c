"""llama.cpp's own source, as the sdist of the installed llama-cpp-python vendors it: fetched once, into the user's cache."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

from _common import cache_folder, could_not_measure, say

SENTENCEPIECE = "0.2.3"  # which the converter imports


def converter(name: str) -> tuple[Path, Path]:
    """Return llama.cpp's converter, and the folder that has to be on its Python path; as ``llama_cpp_source``."""
    site = cache_folder("llama.cpp") / f"sentencepiece-{SENTENCEPIECE}"
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        _pip(name, [*command, f"sentencepiece=={SENTENCEPIECE}"])
    return llama_cpp_source(name) / "convert_hf_to_gguf.py", site


def llama_cpp_source(name: str) -> Path:
    """Return the folder of llama.cpp's source; a benchmark ``name`` that cannot have it could not measure."""
    version = importlib.metadata.version("llama-cpp-python")
    folder = cache_folder("llama.cpp")
    source = folder / f"llama_cpp_python-{version}"
    if not source.exists():
        say(f"fetching the source of llama-cpp-python {version}")
        wanted = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
        _pip(name, [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *wanted])
        archive = folder / f"llama_cpp_python-{version}.tar.gz"
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "unpacking", filter="data")
        (folder / "unpacking" / source.name).rename(source)
        archive.unlink()
    return source / "vendor" / "llama.cpp"


def _pip(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        could_not_measure(name, f"{command[-1]} cannot be fetched: {done.stderr.strip()[-1000:]}")
