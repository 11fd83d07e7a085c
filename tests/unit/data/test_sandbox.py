"""Programs that models write cannot reach the machine, nor say that they are right; those that do what they should run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedistill.data import sandbox
from edgedistill.data.sandbox import Limits, Outcome, Sandbox
from edgedistill.errors import UsageError
from tests.unit.data import hostile

MIB = 1 << 20
# Their marks say what is missing: the one may not be installed, the other forbidden.
ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("bubblewrap", "namespaces")]
each_engine = pytest.mark.parametrize("engine", ENGINES)


def box(engine: str, **limits: float) -> Sandbox:
    return Sandbox(limits=Limits(**{"seconds": 5, **limits}), engine=engine)  # pyright: ignore[reportArgumentType]


@each_engine
def test_nothing_hostile_gets_through(engine: str, tmp_path: Path) -> None:
    wrong = hostile.run(engine, tmp_path, list(hostile.PROGRAMS))
    assert len(wrong) > 50
    assert not {name: what for name, what in wrong.items() if what}


@each_engine
@pytest.mark.skipif(os.geteuid() != 0, reason="this is the user without rights")
def test_nothing_hostile_gets_through_as_a_user_without_rights(engine: str) -> None:
    python = next(
        path
        for path in ("/usr/bin/python3", os.path.realpath(sys.executable))
        if Path(path).exists() and as_nobody([path, "-c", ""]).returncode == 0
    )
    copy = Path(f"/var/tmp/edgedistill-hostile-{os.getpid()}")  # not under a folder of root's
    try:
        for name in (
            "__init__.py",
            "errors.py",
            *(f"data/{p.name}" for p in Path(sandbox.__file__).parent.glob("sand*")),
        ):
            (copy / "edgedistill" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(sandbox.__file__).parents[1] / name, copy / "edgedistill" / name)
        shutil.copy(hostile.__file__, copy)
        (copy / "world").mkdir()
        os.chown(copy / "world", 65534, 65534)
        for one in (copy, *copy.rglob("*")):
            one.chmod(one.stat().st_mode | 0o055 if one.is_dir() else 0o644)
        command = [python, "-B", str(copy / "hostile.py"), engine, str(copy / "world")]
        done = as_nobody(command, PYTHONPATH=str(copy))
        assert done.returncode == 0, done.stderr
        wrong = json.loads(done.stdout)
        assert len(wrong) > 50
        assert not {name: what for name, what in wrong.items() if what}
    finally:
        shutil.rmtree(copy)


def as_nobody(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        user=65534,
        group=65534,
        extra_groups=[],
        env={"PATH": os.environ["PATH"], "HOME": "/root", **environment},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
        check=False,
    )


def test_without_isolation_they_do_get_through(tmp_path: Path) -> None:
    harmless = ["tcp", "udp", "unix socket", "abstract socket", "secrets", "symbolic link"]
    wrong = hostile.run("none", tmp_path, harmless)
    assert all("ESCAPED" in wrong[name] for name in harmless if name != "udp"), wrong
    assert "something came through ['tcp', 'unix', 'abstract', 'udp']" in wrong["the world"]


HONEST = {
    "files": "open('a/b.txt', 'w').write('x')\nassert open('given.txt').read() == 'text'\nprint(input())",
    "subprocess": "import subprocess as s, sys\nprint(s.check_output([sys.executable, '-c', 'print(input())'], text=True)[:-1])",
    "shell": "import os\nassert os.system('cat given.txt > c && grep -q text c') == 0\nprint(input())",
    "threads": "from concurrent.futures import ThreadPoolExecutor as P\nwith P(8) as p: print(*p.map(lambda x: input(), [1]))",
    "processes": "import multiprocessing as m\nif __name__ == '__main__':\n"
    "    with m.get_context('fork').Pool(2) as p: assert p.map(abs, [-1]) == [1]\nprint(input())",
    "library": "import asyncio, ctypes, decimal, hashlib, sqlite3, ssl, tempfile, zlib, zoneinfo\n"
    "async def f(): await asyncio.sleep(0)\nasyncio.run(f())\n"
    "db = sqlite3.connect('d.db'); db.execute('create table t(x)'); db.commit()\n"
    "with tempfile.NamedTemporaryFile(dir='/tmp') as f: f.write(b'x')\nprint(input())",
    "long": "x = '''" + "y" * 300_000 + "'''\nprint(input())",
}


@each_engine
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_run(engine: str, name: str) -> None:
    found = box(engine).run(HONEST[name], stdin="näme\n", files={"given.txt": "text", "a/x": ""})
    assert (found.why, found.stdout) == ("", "näme\n"), found.stderr


@each_engine
def test_what_became_of_a_program(engine: str) -> None:
    one = box(engine, seconds=1)
    found = one.run("import sys\nprint('out')\nsys.stderr.write('err')\nsys.exit(3)")
    assert found == Outcome(ok=False, why="exit 3: err", stdout="out\n", stderr="err", seconds=found.seconds)
    assert one.run("raise ValueError('no: number')").error == "ValueError"
    assert one.run("import json\njson.loads('')").error == "JSONDecodeError"
    assert one.run("def f(:").error == "SyntaxError"
    assert one.run("import os; os._exit(9)").error == "exit 9"
    assert one.run("while 1: pass").error == "timed out"
    assert one.run("x = bytearray(1 << 40)").error == "memory"
    assert one.run("print('\\ud800')").error == "UnicodeEncodeError"
    assert one.run("import os; os.write(1, b'\\xff')").stdout == "�"
    assert 0 < one.run("pass").seconds < 1
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(UsageError, match="no file of the sandbox"):
            one.run("pass", files={name: ""})


@each_engine
def test_it_starts_fast(engine: str) -> None:
    one, seconds = box(engine), []
    for _ in range(5):
        started = time.perf_counter()
        assert one.run("pass").ok
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.2  # 0.07 where nothing else runs


@each_engine
def test_programs_die_with_the_build(engine: str) -> None:
    mark = f"mark-{os.getpid()}-{engine}"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60) # {mark}'])"
    build = (
        "from edgedistill.data.sandbox import Limits, Sandbox\n"
        f"Sandbox(limits=Limits(seconds=60), engine={engine!r}).run({program!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", build], start_new_session=True)
    try:
        until(lambda: len(inside(mark)) >= 1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: not inside(mark))


def inside(mark: str) -> list[int]:
    return [pid for pid in hostile.running(mark) if b"time.sleep(60)" in cmdline(pid)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(good: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not good():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() < end
        time.sleep(0.02)


TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
RIGHT = {
    "plain": "def add(a, b):\n    return a + b",
    "prints": "def add(a, b):\n    print('x')\n    return a + b\nprint(add(1, 2))",
    "own main": "def add(a, b): return a + b\nif __name__ == '__main__': raise SystemExit(1)",
    "classes": "from dataclasses import dataclass\nimport pickle\n@dataclass\nclass P:\n    x: int\n"
    "assert pickle.loads(pickle.dumps(P(1))) == P(1)\ndef add(a, b): return P(a + b).x",
    "thread left": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\ndef add(a, b): return a + b",
}
WRONG = {
    "wrong": ("def add(a, b): return a - b", "AssertionError"),
    "missing": ("", "NameError"),
    "no Python": ("def add(a, b) return", "SyntaxError"),
    "_exit": ("import os; os._exit(0)", "ended before its tests"),
    "exit": ("import sys; sys.exit(0)", "SystemExit"),
    "SystemExit": ("raise SystemExit", "SystemExit"),
    "quit in the function": ("def add(a, b):\n    import sys; sys.exit(0)", "SystemExit"),
    "_exit in the function": ("def add(a, b):\n    import os; os._exit(0)", "ended before its tests"),
    "words": ("print('passed', 'ok', 'True'); print(0)", "NameError"),
    "every descriptor": (
        "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "ended before its tests",
    ),
    "descriptors, then on": (
        "import os\nfor fd in range(3, 60):\n    try: os.write(fd, b'\\n')\n    except OSError: pass\ndef add(a, b): return 0",
        "",
    ),
    "no _exit": ("import os\nos._exit = lambda code: None\ndef add(a, b): return 0", "AssertionError"),
    "no exec": (
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\n__builtins__ = {}\ndef add(a, b): return 0",
        "AssertionError",
    ),
    "no error": (
        "import builtins\nbuiltins.AssertionError = builtins.BaseException = ZeroDivisionError\ndef add(a, b): return 0",
        "AssertionError",
    ),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", "SystemExit"),
    "another program": ("import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])", "ended before its tests"),
    "a fork": ("import os\nif os.fork(): os._exit(0)\nimport time; time.sleep(9)", "ended before its tests"),
    "a thread": (
        "import os, threading, time\nthreading.Thread(target=lambda: (time.sleep(0.3), os._exit(0))).start()\n"
        "def add(a, b): time.sleep(9)",
        "ended before its tests",
    ),
    "no traceback": (
        "import sys\nsys.modules['traceback'] = None\nsys.excepthook = lambda *a: None\ndef add(a, b): return 0",
        "AssertionError",
    ),
    "closed": ("import os\nos.closerange(0, 60)\ndef add(a, b): return a + b", ""),
    "trace": (
        "import sys\ndef t(f, e, a):\n    f.f_trace_lines = True\n    return t\nsys.settrace(t)\ndef add(a, b): return 0",
        "AssertionError",
    ),
    "hanging": ("while True: pass", "timed out"),
}  # fmt: skip


@each_engine
def test_only_passed_tests_pass(engine: str) -> None:
    one = box(engine, seconds=2)
    found = {name: one.judge(code, TESTS).why for name, code in RIGHT.items()}
    assert set(found.values()) == {""}, found
    assert one.judge(RIGHT["plain"], "assert add('ä', '') == 'ä'\n" + "# x\n" * 50_000).ok  # more than a pipe holds
    for name, (code, why) in WRONG.items():
        outcome = one.judge(code, TESTS)
        assert not outcome.ok, name
        assert why in (outcome.error, ""), (name, outcome)


def test_tests_are_not_there_before_the_code_has_run() -> None:
    code = """
import os, sys
for fd in range(60):
    try:
        if b'hidden' in os.pread(fd, 9999, 0): os._exit(5)
    except OSError: pass
def add(a, b): return a + b
"""
    assert Sandbox.open(Limits(seconds=5)).judge(code, "assert add(1, 1) == 2  # hidden").ok


WITHOUT = """
import ctypes, sys
from edgedistill.data import sandbox, sandbox_inside
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
sandbox_inside.deny()  # what a container's filter refuses, this one refuses, too
try:
    print(sandbox.find_engine())
except sandbox.UsageError as error:
    print(error.message, error.hint, sep="|")
"""


@pytest.mark.parametrize("unsafe", ["", "1"])
def test_no_sandbox_is_refused_with_what_to_do(unsafe: str) -> None:
    environment = {**os.environ, "EDGEDISTILL_UNSAFE_EXECUTION": unsafe}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=True)
    if unsafe:
        assert done.stdout == "none\n"
    else:
        assert done.stdout.startswith("no sandbox works here")
        assert "bubblewrap: " in done.stdout and "namespaces: " in done.stdout
        assert "|apt install bubblewrap" in done.stdout and "EDGEDISTILL_UNSAFE_EXECUTION=1" in done.stdout


def test_limits_hold_without_isolation() -> None:
    one = box("none", seconds=1, disk=MIB, memory=128 * MIB, output=1000)
    assert one.judge(RIGHT["plain"], TESTS).ok
    assert one.run("while 1: pass").why == "timed out"
    assert one.run("x = bytearray(1 << 30)").why == "memory"
    assert one.run("print('x' * 9999)").why == "output"
    assert "File too large" in one.run("open('x', 'wb').write(bytes(2 << 20))").why
    mark = f"mark-{os.getpid()}-none"
    sleep = f"[sys.executable, '-c', 'import time; time.sleep(60) # {mark}']"
    daemon = f"import subprocess, sys\nsubprocess.Popen({sleep}, start_new_session=True)"
    assert one.run(daemon).ok
    assert not inside(mark)
