"""The inner half of ``data/sandbox.py``: make the namespaces where bubblewrap does not, then run one program and watch it.

``sandbox.py`` hands the text of this file to ``python -I -S -B -c``, for nothing of the package can be seen in a sandbox: it may
import the standard library only. Standard input is a length and a JSON object, and then stays open as long as the build lives;
standard output is one JSON object, what became of the program. The program itself is another process, with its own pipes.

Who watches is process 1 of the namespace: no signal from within reaches it, and when it ends the kernel ends all others. It has
the program's uid, no capability, and cannot be traced (not dumpable). Limits come from four sides: rlimits (each process),
tmpfs (disk), a look at all processes every 20 ms (memory as a whole, files, output, time), and a seccomp filter for what no
limit counts (memfd, System V memory) and no program needs (keyrings, new namespaces, tracing).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import secrets
import selectors
import signal
import struct
import sys
import time
from typing import Any

_NEW = {"cgroup": 0x02000000, "ipc": 0x08000000, "mnt": 0x00020000, "net": 0x40000000, "pid": 0x20000000}
_NEW |= {"user": 0x10000000, "uts": 0x04000000}
_SPACES = sum(_NEW.values())
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _PIVOT_ROOT, _AT_RECURSIVE, _DETACH = 442, {"x86_64": 155, "aarch64": 41}, 0x8000, 2
_TICK_S = 0.02
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> int:
    """Call libc, strings as bytes. Raises OSError that names the function."""
    given = [value.encode() if isinstance(value, str) else value for value in arguments]
    given = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in given]
    found = getattr(_libc, name)(*given)
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments[:3]}: {os.strerror(number)}")
    return found


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(1, signal.SIGKILL)


def _mount(source: str | None, goal: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    _call("mount", source, goal, kind, flags, data)


def _restrict(path: str, flags: int) -> None:
    """Set mount flags below a path, submounts included (mount_setattr, Linux 5.12; flags that are locked stay)."""
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", flags, 0, 0, 0))
    _call("syscall", _MOUNT_SETATTR, -100, path, _AT_RECURSIVE, attributes, 32)


def enter(told: dict[str, Any]) -> None:
    """Make namespaces and a root of their own, and return as their process 1. The process that called waits and ends with it."""
    _die_with_parent()
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", _SPACES & ~_NEW["user"] if told["uid"] else _SPACES)
    if not told["uid"]:  # no root: a namespace of users gives the rights to mount, in it only
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"65534 {uid} 1")
        _write("/proc/self/gid_map", f"65534 {gid} 1")
    child = os.fork()
    if child:
        os.close(0)
        os.close(1)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _die_with_parent()
    _root(told["view"], told["scratch"], told["limits"])


def _root(view: dict[str, Any], scratch: str, limits: dict[str, Any]) -> None:
    """Replace the file system: a small tmpfs with what the view names, read-only, and the scratch folder."""
    _mount(None, "/", None, _PRIVATE | _REC)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    os.mkdir("/tmp/.outside")
    _call("syscall", _PIVOT_ROOT[platform.machine()], "/tmp", "/tmp/.outside")
    os.chdir("/")
    for path in view["bind"]:
        _under(path, "/.outside" + path)
        _mount("/.outside" + path, path, None, _BIND | _REC)
        _restrict(path, _RDONLY | _NOSUID | _NODEV)
    for path in view["hide"]:
        _mount("tmpfs", path, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k")
    for path in view["devices"]:
        _under(path, "/.outside" + path)
        _mount("/.outside" + path, path, None, _BIND)
    for path, goal in view["links"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(goal, path)
    os.makedirs("/proc")
    _mount("proc", "/proc", "proc", _NOSUID | _NODEV | 8)
    os.mkdir(scratch)
    most = f"mode=1777,size={limits['disk']},nr_inodes={limits['files'] + 16}"
    _mount("tmpfs", scratch, "tmpfs", _NOSUID | _NODEV, most)
    _call("umount2", "/.outside", _DETACH)
    os.rmdir("/.outside")
    _mount(None, "/", None, _BIND | 32 | _RDONLY | _NOSUID | _NODEV)  # remount, this one only


def _under(path: str, source: str) -> None:
    """Make what a bind goes onto: a folder, or a file."""
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o444))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def give_up_rights(uid: int) -> None:
    """Become ``uid`` where that is not 0, keep no capability, gain none by any program, and be no one's to trace."""
    _write("/proc/self/oom_score_adj", "1000")  # while /proc/self is ours: where memory ends, this goes first
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    # capset(2), version 3: two times effective, permitted, inheritable
    _call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
    _prctl(38, 1)  # no_new_privs
    _prctl(4, 0)  # not dumpable
    _die_with_parent()  # a change of uid cleared it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 gets no signal that it does not handle


# Numbers of system calls: System V memory, semaphores and queues, ptrace, syslog, personality, modules, mounts, clocks, keyrings,
# unshare, vmsplice, perf, fanotify, files by handle, setns, other processes' memory, kcmp, memfd, kexec, bpf, userfaultfd.
_DENIED = {
    "x86_64": "29 30 31 64 65 68 69 71 101 103 135 154 155 159 161 163 164 165 166 167 168 169 170 171 172 173 175 "
    "176 179 227 240 246 248 249 250 272 278 279 298 300 303 304 305 308 310 311 312 313 319 320 321 323",
    "aarch64": "39 40 41 51 60 75 89 92 97 104 105 106 112 116 117 142 161 162 170 171 180 186 187 188 189 190 191 "
    "192 193 194 195 196 217 218 219 224 225 239 241 262 264 265 266 268 270 271 272 273 279 280 282 294",
}
_DENIED_NEW = (
    "425 426 427 428 429 430 431 432 433 438 442 447"  # io_uring, mounts, pidfd_getfd, memfd_secret: the same on both
)
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}


def deny() -> None:
    """Refuse system calls from here on (seccomp(2), classic BPF): EPERM for the lists and for ``clone`` into namespaces, ENOSYS for
    ``clone3``, whose flags a filter cannot read (libc then takes ``clone``). On other machines nothing happens.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURE or sys.maxsize < 2**32:
        return
    load, equal, least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    code = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    code += [(least, 0, 1, 0x40000000), (answer, 0, 0, eperm)]  # x32
    for number in f"{_DENIED[machine]} {_DENIED_NEW}".split():
        code += [(equal, 0, 1, int(number)), (answer, 0, 0, eperm)]
    code += [(equal, 0, 1, 435), (answer, 0, 0, enosys)]
    code += [(equal, 0, 3, _CLONE[machine]), (load, 0, 0, 16), (bits, 0, 1, _SPACES), (answer, 0, 0, eperm)]
    code += [(answer, 0, 0, allow)]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    _call("prctl", 22, 2, program, 0, 0)


def _file_of(text: str) -> int:
    """Return a descriptor of a text that no folder has."""
    fd = os.memfd_create("text")
    with open(os.dup(fd), "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _limit(limits: dict[str, Any], isolated: bool) -> None:
    """Set the limits of each process. Without a namespace, and before Linux 5.14 in one, all processes of the user are counted."""
    version = tuple(int(part) for part in platform.release().replace("-", ".").split(".")[:2])
    beside = 0 if isolated and version >= (5, 14) else 4096
    cpu = int(limits["seconds"]) + 1
    for name, most in {
        "AS": limits["memory"],
        "CPU": cpu * 2,
        "NPROC": limits["processes"] + 2 + beside,
        "NOFILE": 256,
        "FSIZE": limits["disk"],
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "STACK": 8 << 20,
    }.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (most, most))


def _start(told: dict[str, Any], stdin: int, stdout: int, stderr: int, beside: tuple[int, ...]) -> int:
    """Start the program in a session of its own; it inherits the descriptors ``beside`` by their numbers."""
    # The program is a file that no folder has: an argument could be 128 KiB long at most.
    what = ["-c", told["driver"], *map(str, beside)] if told["driver"] else [f"/proc/self/fd/{beside[0]}"]
    command = [sys.executable, "-I", "-S", "-B", *what]
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        for fd, source in enumerate((stdin, stdout, stderr)):
            os.dup2(source, fd)
        for fd in beside:
            os.set_inheritable(fd, True)
        _limit(told["limits"], told["isolated"])
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.chdir(told["scratch"])
        os.execve(sys.executable, command, told["environment"])
    except BaseException as error:
        os.write(2, f"the sandbox could not start the program: {error}\n".encode())
    os._exit(127)


def _others(isolated: bool) -> list[int]:
    """Return the processes of the program: all but this one or, without a namespace, those that descend from it."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it has ended
    me = os.getpid()
    if isolated:
        return [pid for pid in parents if pid != me]
    found, more = [], [me]
    while more:
        more = [pid for pid, parent in parents.items() if parent in more]
        found += more
    return found


def _memory(pids: list[int], limit: int) -> int:
    """Return the bytes that the processes hold: resident ones and, where those are over the limit, without counting shared ones
    twice.
    """
    page = os.sysconf("SC_PAGESIZE")
    held, exact = {}, 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as file:
                held[pid] = int(file.read().split()[1]) * page
        except (OSError, IndexError):
            continue
    if sum(held.values()) <= limit:
        return sum(held.values())
    for pid, resident in held.items():
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                exact += next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))
        except ProcessLookupError:
            continue
        except (OSError, StopIteration):  # it made itself unreadable
            exact += resident
    return exact


class _Said:
    """What the program has written to its pipes, each read as far as ``most`` bytes and a little on."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.pipes = {name: os.pipe() for name in ("stdout", "stderr", "verdict")}
        self.text = dict.fromkeys(self.pipes, b"")
        self.waiting = selectors.DefaultSelector()
        for name, (fd, _) in self.pipes.items():
            os.set_blocking(fd, False)
            self.waiting.register(fd, selectors.EVENT_READ, name)

    def take(self, name: str) -> bool:
        """Read what is there; tell whether there was something."""
        fd = self.pipes[name][0]
        if fd not in self.waiting.get_map():
            return False
        try:
            more = os.read(fd, 65536)
        except BlockingIOError:
            return False
        if not more:
            self.waiting.unregister(fd)
        self.text[name] += more
        return bool(more)

    def over(self) -> bool:
        """Tell whether too much was written."""
        return any(len(text) > self.most for text in self.text.values())


def watch(told: dict[str, Any]) -> dict[str, Any]:
    """Run the program, and return what became of it: ``code`` (exit code, minus the signal; None where it was ended), ``ended``
    (why it was ended, or ""), ``passed``, stdout, stderr, seconds.
    """
    limits, scratch, isolated = told["limits"], told["scratch"], told["isolated"]
    for name, text in told["files"].items():
        path = os.path.join(scratch, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    stdin, tests, turn, said = _file_of(told["stdin"]), _file_of(""), os.pipe(), _Said(limits["output"])
    beside = (_file_of(told["program"]),)
    if told["driver"]:
        beside += (tests, said.pipes["verdict"][1], turn[0])
    deny()
    started = looked = time.monotonic()
    child = _start(told, stdin, said.pipes["stdout"][1], said.pipes["stderr"][1], beside)
    for _, end in said.pipes.values():
        os.close(end)
    said.waiting.register(0, selectors.EVENT_READ, "build")
    with contextlib.suppress(OSError):  # it is looked at with every tick, too
        said.waiting.register(os.pidfd_open(child), selectors.EVENT_READ, "child")
    nonce, code, ended = b"", None, ""
    while code is None and not ended:
        for key, _ in said.waiting.select(_TICK_S):
            if key.data == "build" and not os.read(0, 1):
                ended = "the build has ended"
            elif key.data in said.text:
                said.take(key.data)
        if said.text["verdict"] and not nonce:  # the answer's code has run: only now what it is tested by comes in here
            nonce = secrets.token_hex(16).encode()
            os.pwrite(tests, nonce + told["tests"].encode("utf-8", "surrogatepass"), 0)
            said.text["verdict"] = b""
            with contextlib.suppress(BrokenPipeError):
                os.write(turn[1], b"\n")
        code = _reap(child)
        now = time.monotonic()
        if code is not None:
            for name in said.text:
                while not said.over() and said.take(name):
                    pass
        elif now - started > limits["seconds"]:
            ended = ended or "timed out"
        elif now - looked > _TICK_S:
            looked = now
            ended = ended or _excess(limits, scratch, isolated)
        if said.over():
            ended = "output"
    if not isolated:
        _end()
    out = {name: said.text[name][: limits["output"]].decode("utf-8", "replace") for name in ("stdout", "stderr")}
    passed = bool(nonce) and secrets.compare_digest(said.text["verdict"], nonce) and code == 0 and not ended
    return {"code": code, "ended": ended, "passed": passed, "seconds": time.monotonic() - started, **out}


def _reap(child: int) -> int | None:
    """Let go of processes that have ended, the program's orphans among them; return the exit code of ``child``, once it is one."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if not pid:
            return None


def _excess(limits: dict[str, Any], scratch: str, isolated: bool) -> str:
    """Name what all processes together have too much of, or return ""."""
    if _memory(_others(isolated), limits["memory"]) > limits["memory"]:
        return "memory"
    space = os.statvfs(scratch)
    return "files" if isolated and space.f_files - space.f_ffree > limits["files"] else ""


def _end() -> None:
    """Kill what is left of the program, where no namespace does it."""
    for _ in range(100):
        for pid in _others(isolated=False):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _read(count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = os.read(0, count - len(found))
        if not more:
            os._exit(1)
        found += more
    return found


def main() -> None:
    """Read what to run, and how far this process is in already; report."""
    told = json.loads(_read(struct.unpack("Q", _read(8))[0]))
    if told["engine"] == "namespaces":
        enter(told)
    if told["engine"] == "none":
        _prctl(36, 1)  # orphans of the program come to this process
    give_up_rights(told["uid"])
    report = json.dumps(watch(told)).encode()
    while report:
        report = report[os.write(1, report) :]
    os._exit(0)


if __name__ == "__main__":
    main()
