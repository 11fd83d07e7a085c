"""Run Python that a model wrote: no network, no files but a scratch folder, no secrets, and limits on all that it may use.

A program runs as ``python -I -S -B -c``, with the interpreter that runs edgedistill (``sys.executable`` without its virtual
environment) and its standard library only: no installed package can be imported. It sees /usr, the shared libraries and the
interpreter, all read-only, and one folder that is its own: its working directory, HOME and TMPDIR, in memory, gone when it ends. No
home, store, /etc or /tmp of the machine is there to be read. Its environment has PATH, LANG, HOME and TMPDIR.

What isolates it (``find_engine``), the first of these that works when tried:

- bubblewrap (``apt install bubblewrap``);
- namespaces that we make ourselves (``sandbox_inside.py``; Linux 5.12);
- nothing, with limits only, where ``EDGEDISTILL_UNSAFE_EXECUTION=1`` says so: for machines that hold nothing but this work.

As root the program gets a user id of its own that owns nothing. A kernel's bug is a way out of any of them: a program that was
written to attack this machine belongs into a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import random
import re
import shutil
import site
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from edgedistill.errors import EdgeDistillError, StepFailed, UsageError

Engine = Literal["bubblewrap", "namespaces", "none"]
UNSAFE = "EDGEDISTILL_UNSAFE_EXECUTION"
INSTALL = "apt install bubblewrap"
SCRATCH = "/scratch"
_GRACE_S = 10.0  # for a machine that is busy: the inner half keeps the time itself
_PYTHON = ("-I", "-S", "-B", "-c")
_NAMED = re.compile(r"^([A-Za-z_][\w.]*)(?::|$)")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use, with all processes that it starts; sizes in bytes. ``disk`` is memory, too, beside ``memory``."""

    seconds: float = 10.0
    memory: int = 512 << 20
    disk: int = 64 << 20
    files: int = 4096
    processes: int = 64  # threads are counted, too
    output: int = 256 << 10  # of stdout, and of stderr


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program. ``why`` is "" where all is well, else "timed out", "memory", "output", "files", "killed: SIGSEGV",
    "exit 1: ValueError: no number", …; ``error`` is the same in a word or two: "ValueError".
    """

    ok: bool
    why: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def error(self) -> str:
        """Return why without what is particular: the class of the exception, where there was one."""
        rest = self.why.partition(": ")[2] if self.why.startswith("exit ") else ""
        named = _NAMED.match(rest)
        return named[1].rpartition(".")[2] if named else self.why


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Run programs within ``limits`` by ``engine``; safe to call from several threads."""

    limits: Limits
    engine: Engine

    @classmethod
    def open(cls, limits: Limits | None = None) -> Sandbox:
        """Return one with the best engine of this machine. Raises UsageError where there is none."""
        return cls(limits=limits or Limits(), engine=find_engine())

    def run(self, program: str, *, stdin: str = "", files: Mapping[str, str] | None = None) -> Outcome:
        """Run a program; ok where it exits with 0. ``files`` (name -> text) are there before it starts. Raises UsageError for a
        name that leads out of the folder, StepFailed where no sandbox can be made.
        """
        found = self._run({"program": program, "stdin": stdin, "files": dict(files or {}), "driver": None, "tests": ""})
        why = _why(found)
        return Outcome(ok=not why, why=why, stdout=found["stdout"], stderr=found["stderr"], seconds=found["seconds"])

    def judge(self, code: str, tests: str) -> Outcome:
        """Run an answer's code and then its tests, in one interpreter; ok where no exception came of either and all tests ran.

        What passes is a random number that the interpreter gets, with the tests, when the code has run, and writes when they have.
        Code that exits, prints or replaces builtins does not pass by that. What remains: the code could leave something behind (a
        thread, a changed module of the library, an object that equals everything) that acts while the tests run in the same
        interpreter, or do what the driver does before it. That takes a program made to cheat this file, or tests that trust
        what they compare.
        """
        driver = _source("sandbox_tested.py")
        found = self._run({"program": code, "stdin": "", "files": {}, "driver": driver, "tests": tests})
        why = "" if found["passed"] else _why(found) or "ended before its tests"
        return Outcome(ok=not why, why=why, stdout=found["stdout"], stderr=found["stderr"], seconds=found["seconds"])

    def _run(self, what: dict[str, Any]) -> dict[str, Any]:
        for name in what["files"]:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise UsageError(f"{name!r} is no file of the sandbox's folder", "Give relative paths, without '..'.")
        if self.engine == "none":
            with tempfile.TemporaryDirectory(prefix="edgedistill-run-") as folder:
                return self._supervised(what, folder)
        return self._supervised(what, SCRATCH)

    def _supervised(self, what: dict[str, Any], scratch: str) -> dict[str, Any]:
        limits = vars(self.limits)
        uid = random.SystemRandom().randrange(20000, 60000) if _mighty() and self.engine != "none" else 0
        clean = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2"}
        told = {
            **what,
            "engine": self.engine,
            "isolated": self.engine != "none",
            "limits": limits,
            "uid": uid,
            "scratch": scratch,
            "view": _view() if self.engine == "namespaces" else None,
            "environment": {**clean, "HOME": scratch, "TMPDIR": scratch},
        }
        command = [_interpreter(), *_PYTHON, _source("sandbox_inside.py")]
        if self.engine == "bubblewrap":
            command = [*_bubblewrap(scratch, self.limits.disk), *command]
        data = json.dumps(told).encode()
        # Kept open until all is over: where this process ends, the inner half reads the end of the pipe, and ends.
        read, alive = os.pipe()
        try:
            process = subprocess.Popen(
                command,
                stdin=read,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=clean,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            os.close(alive)
            raise StepFailed(f"the sandbox ({self.engine}) cannot be started: {error}", _doctor()) from None
        finally:
            os.close(read)
        with process:
            try:
                with os.fdopen(alive, "wb", buffering=0, closefd=True) as pipe:
                    with contextlib.suppress(BrokenPipeError):  # what it wrote says why
                        _send(pipe.fileno(), struct.pack("Q", len(data)) + data)
                    out, err = process.communicate(timeout=self.limits.seconds + _GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                if not out:
                    return {"code": None, "ended": "timed out", "passed": False, "stdout": "", "stderr": ""} | {
                        "seconds": self.limits.seconds + _GRACE_S
                    }
            finally:
                if process.poll() is None:  # an exception of ours, such as Ctrl-C
                    process.kill()
        try:
            return json.loads(out)
        except ValueError:
            last = (err.decode("utf-8", "replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise StepFailed(f"the sandbox ({self.engine}) cannot be made: {last}", _doctor()) from None


def _send(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data[: 1 << 20]) :]


def _doctor() -> str:
    return f"edgedistill doctor   # says which sandboxes work here; {INSTALL}"


def _why(found: Mapping[str, Any]) -> str:
    """Return a short reason from what the inner half reports, "" where the program ended well."""
    if found["ended"]:
        return found["ended"]
    code, lines = found["code"], found["stderr"].strip().splitlines()
    last = lines[-1].strip()[:160] if lines else ""
    if code == 0:
        return ""
    if last.startswith("MemoryError"):
        return "memory"
    if code < 0:
        return f"killed: {_signal(-code)}"
    return f"exit {code}: {last}" if last else f"exit {code}"


def _signal(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@functools.cache
def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@functools.cache
def _interpreter() -> str:
    return os.path.realpath(sys.executable)


def _mighty() -> bool:
    """Tell whether this process is root with the right to mount: then no namespace of users is needed."""
    if os.geteuid() != 0:
        return False
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    return all(held >> number & 1 for number in (6, 7, 21))  # setgid, setuid, sys_admin


@functools.cache
def _view() -> dict[str, Any]:
    """Return what a program sees of this machine, beside /proc: ``bind`` (paths, read-only), ``hide`` (folders in them that are
    shown empty: installed packages), ``devices``, ``links``.
    """
    prefixes = dict.fromkeys((sys.base_prefix, sys.base_exec_prefix))
    libraries = [Path(prefix) / name for prefix in prefixes for name in ("lib", "lib64")]
    wanted = [Path("/usr"), *libraries, Path(sysconfig.get_path("stdlib"))]
    wanted += [Path(_interpreter()), Path("/etc/ld.so.cache")]
    links = {"/tmp": SCRATCH, "/dev/shm": SCRATCH, "/dev/fd": "/proc/self/fd"}
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            links[str(path)] = os.readlink(path)
        elif path.is_dir():
            wanted.append(path)
    bind: list[Path] = []
    for path in wanted:
        if path.exists() and not any(map(path.is_relative_to, (*links, *bind))):
            bind.append(path)
    packages = [Path(folder) for folder in site.getsitepackages(list(prefixes))]
    packages += [Path("/usr/lib/python3/dist-packages")]
    hide = [str(path) for path in dict.fromkeys(packages) if path.is_dir() and any(map(path.is_relative_to, bind))]
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    return {"bind": list(map(str, bind)), "hide": hide, "devices": devices, "links": links}


def _bubblewrap(scratch: str, disk: int) -> list[str]:
    """Return the command that runs what follows it in a sandbox, as process 1 of it."""
    view = _view()
    found = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    found += ["--unshare-cgroup-try", "--die-with-parent", "--as-pid-1", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if _mighty():  # to become another user, which the inner half does first
        found += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        found += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    above = {parent for path in (*view["bind"], *view["devices"]) for parent in Path(path).parents}
    for folder in sorted(above - {Path("/")}):  # bubblewrap makes them for root only
        found += ["--perms", "0755", "--dir", str(folder)]
    for path in view["bind"]:
        found += ["--ro-bind", path, path]
    for path in view["hide"]:
        found += ["--perms", "0755", "--tmpfs", path, "--remount-ro", path]
    for path in view["devices"]:
        found += ["--dev-bind", path, path]
    for path, goal in view["links"].items():
        found += ["--symlink", goal, path]
    found += ["--proc", "/proc", "--perms", "1777", "--size", str(disk), "--tmpfs", scratch, "--remount-ro", "/"]
    return [*found, "--chdir", "/", "--"]


def probe(engine: Engine) -> str:
    """Try an engine; return "" where it works, else why it does not."""
    if platform.system() != "Linux":
        return f"sandboxes need Linux, and this is {platform.system()}"
    if engine == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    try:
        told = "import os; print(os.getppid(), os.getuid() != 0, os.listdir('.'))"
        found = Sandbox(limits=Limits(), engine=engine).run(told)
    except (EdgeDistillError, OSError) as error:
        return str(error)
    if engine != "none" and found.stdout != "1 True []\n":
        return found.why or f"no namespace of its own: {found.stdout.strip()}"
    return found.why


@functools.cache
def find_engine() -> Engine:
    """Return the best engine that works here. Raises UsageError where none does and ``EDGEDISTILL_UNSAFE_EXECUTION`` is not 1."""
    why = {}
    for engine in ("bubblewrap", "namespaces"):
        why[engine] = probe(engine)
        if not why[engine]:
            return engine
    if os.environ.get(UNSAFE) == "1" and platform.system() == "Linux":
        return "none"
    raise UsageError(
        "no sandbox works here, and programs that a model wrote are not run without: "
        + "; ".join(f"{engine}: {told}" for engine, told in why.items()),
        f"{INSTALL}; in a container allow namespaces (docker run --security-opt seccomp=unconfined --cap-add SYS_ADMIN); on a "
        f"machine that holds nothing else {UNSAFE}=1 runs them with limits only",
    )
