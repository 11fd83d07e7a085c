"""Programs that try to get out of the sandbox, or to take the machine with them, and the world that they must not reach.

Standard library only: ``test_sandbox.py`` also runs this file as another user, with an interpreter that this user may read. A
program prints ESCAPED where it got through; ``run`` looks at the world, too.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from edgedistill.data.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=5, memory=128 << 20, disk=8 << 20, files=500, processes=32, output=64 << 10)


def tries(*statements: str) -> str:
    """Return a program that runs statements one by one, and tells of each that did not raise."""
    head = "import ctypes, os, signal, socket, stat, subprocess, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    return head + "".join(
        f"try:\n    {one}\n    print('ESCAPED', {one!r})\nexcept Exception as error:\n    print('no', repr(error))\n"
        for one in statements
    )


def calls(*numbers: str) -> str:
    """Return a program that makes system calls (x86-64's numbers, with arguments); each must fail."""
    told = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    return told + "".join(f"if libc.syscall({one}) >= 0: print('ESCAPED', {one!r})\n" for one in numbers)


WALK = """
import os
for name in os.listdir('/proc'):
    for file in ('environ', 'root/%(secret)s', 'cwd/../%(secret)s', 'mem', 'maps') if name.isdigit() else ():
        try:
            text = open(f'/proc/{name}/{file}', 'rb').read(1 << 16)
        except (OSError, ValueError):
            continue
        if b'HOSTSECRET' in text or (name == '1' and file in ('mem', 'environ') and text):
            print('ESCAPED', name, file)
"""
OUTSIDE = ("/x", "/usr/x", "/etc/x", "/var/tmp/x", "/dev/x", "/proc/x", "/bin/x", "%(folder)s/x", "%(repo)s/x", "/../x")
# name -> (program, what must become of it: the beginning of why, "!" for any, "" for ok, None for whatever)
PROGRAMS: dict[str, tuple[str, str | None]] = {
    "tcp": (tries("socket.create_connection(('127.0.0.1', %(tcp)d), 1)"), ""),
    "tcp6": (tries("socket.create_connection(('::1', %(tcp)d), 1)", "socket.create_connection(('10.0.0.1', 22), 1)"), ""),
    "udp": ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', %(udp)d))", None),
    "unix socket": (tries("socket.socket(socket.AF_UNIX).connect('%(folder)s/socket')"), ""),
    "abstract socket": (tries("socket.socket(socket.AF_UNIX).connect('\\0%(mark)s')"), ""),
    "dns": (tries("socket.gethostbyname('example.com')", "socket.gethostbyname('localhost.localdomain')"), ""),
    "raw socket": (tries("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "socket.socket(2, 3, 1)"), ""),
    "interfaces": ("import socket\nif {n for _, n in socket.if_nameindex()} - {'lo'}: print('ESCAPED')", ""),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timed out"),
    "forks": (
        "import os, time\ncount = 0\ntry:\n    while count < 99:\n        if not os.fork(): time.sleep(9)\n        count += 1\n"
        "except OSError: pass\nprint('ESCAPED' if count > 33 else count)",
        "",
    ),
    "threads": (
        "import os, threading, time\ncount = 0\ntry:\n    while count < 99:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n        count += 1\n"
        "except RuntimeError: pass\nprint('ESCAPED' if count > 33 else count, flush=True)\nos._exit(0)",
        "",
    ),
    "bytearray": ("x = bytearray(1 << 30)", "memory"),
    "list": ("x = []\nwhile True: x.append(' ' * 100000)", "memory"),
    "mmap": ("import mmap\nx = [mmap.mmap(-1, 50 << 20) for _ in range(9)]\nfor m in x: m.write(b'x' * (50 << 20))", "exit 1: "),
    "memory of many": (
        "import os, time\nfor _ in range(4): os.fork()\nx = bytearray(os.urandom(1 << 20)) * 40\ntime.sleep(9)",
        "memory",
    ),
    "shared memory": (
        calls("29, 0, 1 << 30, 0o1666", "319, b'x', 0", "447, 0", "240, b'x', 66, 0, 0") + tries("os.memfd_create('x')"),
        "",
    ),
    "disk": (
        "size = 0\ntry:\n    for n in range(99):\n        with open(f'f{n}', 'wb') as f: size += f.write(bytes(1 << 20))\n"
        "except OSError: pass\nprint('ESCAPED' if size > 9 << 20 else size)",
        "",
    ),
    "disk by way of /dev/shm": ("for n in range(99): open(f'/dev/shm/{n}', 'wb').write(bytes(1 << 20))", "exit 1: OSError"),
    "sparse file": (tries("open('s', 'wb').truncate(1 << 40)", "os.posix_fallocate(os.open('t', 66), 0, 1 << 30)"), ""),
    "small files": ("import os\nfor n in range(10**6): open(str(n), 'w')", "!"),
    "folders": ("import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')", "!"),
    "secrets": (
        tries(
            *(f"open({name!r}).read()" for name in ("%(secret)s", "/etc/shadow", "/etc/passwd", "/etc/hostname")),
            *(f"os.listdir({name!r})" for name in ("%(folder)s", "%(repo)s", "/home", "/var", "/sys", "/run", "/mnt")),
        ),
        "",
    ),
    "home": (
        "import os, sys\nfrom pathlib import Path\ntry: names = os.listdir('%(home)s')\nexcept OSError: names = []\n"
        "known = Path(sys.executable).relative_to('/').parts\n"
        "if [n for n in names if n not in known and n not in ('x11', 'scratch')] and '%(home)s' != '/': print('ESCAPED', names)",
        "",
    ),
    "environment": (
        "import os\nif set(os.environ) - {'PATH', 'LANG', 'LC_CTYPE', 'HOME', 'TMPDIR', 'MALLOC_ARENA_MAX'}: print('ESCAPED')",
        "",
    ),
    "environment of others": (WALK, ""),
    "writing": (tries(*(f"open({name!r}, 'w')" for name in OUTSIDE)), ""),
    "writing to the interpreter": (tries("open(sys.executable, 'r+')", "open(os.__file__, 'a')", "os.remove(os.__file__)"), ""),
    "/tmp is its own": ("open('/tmp/%(mark)s', 'w')\nopen('/dev/shm/%(mark)s', 'w')", ""),
    "symbolic link": (tries("os.symlink('%(secret)s', 'l') or open('l').read()", "open('../../../../%(secret)s').read()"), ""),
    "hard link": (tries("os.link('/usr/bin/env', 'h')", "os.link('%(secret)s', 'h2')", "os.rename('/usr/bin/env', 'h3')"), ""),
    "roots of others": (
        tries(*(f"open('/proc/{who}/root/%(secret)s').read()" for who in ("self", "1", "%(parent)d")), "os.listdir('/proc/1/fd')"),
        "",
    ),
    "system calls": (
        calls(
            "165, b'x', b'/scratch', b'tmpfs', 0, 0", "161, b'/scratch'", "272, 0x10000000", "272, 0x20000", "155, b'.', b'.'",
            "56, 0x10000011, 0, 0, 0, 0", "435, 0, 0", "101, 16, 1, 0, 0", "310, 1, 0, 0, 0, 0, 0", "308, 0, 0", "250, 0, -3, 0",
            "248, b'user', b'a', b'b', 1, -3", "321, 0, 0, 0", "298, 0, 0, -1, -1, 0", "323, 0", "425, 1, 0", "175, 0, 0, b''",
            "169, 0", "304, -100, 0, 0", "135, 0x0040000", "166, b'/usr', 2", "170, b'x', 1", "428, -100, b'/', 1", "438, 1, 0, 0",
        ),
        "",
    ),
    "mount and unshare": (tries("subprocess.check_output(['unshare', '-Ur', 'id'])", "os.chroot('.')"), ""),
    "killing all": ("import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('alive')", None),
    "killing the parent": (
        "import os, signal\nfor number in range(1, 65):\n    try: os.kill(os.getppid(), number)\n    except OSError: pass\n"
        "try: os.kill(%(victim)d, 9)\nexcept OSError: print('alive')",
        "",
    ),
    "uid 0": (tries("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.setresuid(0, 0, 0)", "os.chown('.', 0, 0)"), ""),
    "set-uid programs": (
        tries("subprocess.check_output(['su', '-c', 'id'])", "subprocess.check_output(['mount', '-t', 'tmpfs', 'x', '/scratch'])"),
        "",
    ),
    "sysctl": (
        tries(*(f"open('/proc/{n}', 'w').write('1')" for n in ("sys/kernel/core_pattern", "sysrq-trigger", "sys/vm/drop_caches")))
        + tries("socket.sethostname('x')", "open('/proc/1/oom_score_adj', 'w').write('-1000')"),
        "",
    ),
    "devices": (
        tries("os.mknod('d', stat.S_IFBLK | 0o600, os.makedev(254, 0))", "os.mknod('e', stat.S_IFCHR | 0o600, os.makedev(1, 1))")
        + tries(*(f"open('/dev/{name}', 'rb')" for name in ("vda", "sda", "mem", "kmsg", "tty", "console", "nvidia0", "fuse"))),
        "",
    ),
    "raising limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "exit 1: ValueError"),
    "daemon": (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60) # %(mark)s'],"
        " start_new_session=True)",
        "",
    ),
    "daemon by two forks": (
        "import os, sys\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60) # %(mark)s'])\n"
        "    os._exit(0)\nos.wait()",
        "",
    ),
    "no SIGTERM": ("import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass", "timed out"),
    "sleeping": ("import time\ntime.sleep(3600)", "timed out"),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timed out"),
    "reading": ("import sys\nprint(len(sys.stdin.read()))", ""),
    "flood": ("while True: print('x' * 1000)", "output"),
    "flood of errors": ("import os\nwhile True: os.write(2, b'x' * 100)", "output"),
    "flood by a child": ("import os\nif os.fork(): os._exit(0)\nwhile True: os.write(1, b'x' * 100)", None),
    "huge exception": ("raise ValueError('x' * 60000)", "exit 1: ValueError: xxx"),
    "crash": ("import ctypes\nctypes.string_at(0)", "killed: SIGSEGV"),
    "deep recursion": ("def f(): return f()\nf()", "exit 1: RecursionError"),
    "installed packages": (tries("import numpy", "import pip", "import edgedistill", "import apt_pkg", "import yaml"), ""),
}  # fmt: skip


def run(engine: str, folder: Path, names: list[str]) -> dict[str, str]:
    """Run programs by an engine; return what was wrong of each, "" where it did what it must. The world lies in ``folder``."""
    mark = f"mark{secrets.token_hex(8)}"
    (folder / "secret").write_text("HOSTSECRET")
    os.environ["EDGEDISTILL_TEST_SECRET"] = "HOSTSECRET"
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    os.chmod(folder / "socket", 0o777)
    abstract.bind(f"\0{mark}")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    world = {
        "tcp": tcp.getsockname()[1],
        "udp": udp.getsockname()[1],
        "folder": str(folder),
        "secret": str(folder / "secret"),
        "mark": mark,
        "victim": victim.pid,
        "parent": os.getpid(),
        "home": str(Path.home()),
        "repo": str(Path(__file__).parent),
    }
    for one in (unix, abstract):
        one.listen()
    for one in (tcp, udp, unix, abstract):
        one.setblocking(False)
    sandbox = Sandbox(limits=LIMITS, engine=engine)  # pyright: ignore[reportArgumentType]
    hasty = replace(sandbox, limits=replace(LIMITS, seconds=0.5))

    def one_of(name: str) -> str:
        program, wanted = PROGRAMS[name]
        for key, value in world.items():
            program = program.replace(f"%({key})s", str(value)).replace(f"%({key})d", str(value))
        started = time.monotonic()
        found = (hasty if wanted == "timed out" else sandbox).run(program)
        took = time.monotonic() - started
        if "ESCAPED" in found.stdout:
            return f"{found.stdout} {found.stderr}"
        good = {"": found.ok, "!": not found.ok, None: True}
        if not good.get(wanted, found.why.startswith(wanted or "")):
            return f"{found.why!r} instead of {wanted!r}: {found.stdout} {found.stderr}"[:2000]
        if len(found.stdout) > LIMITS.output or len(found.why) > 250:
            return "too much is told"
        return f"took {took:.1f} s" if took > LIMITS.seconds + 3 else ""

    try:
        with ThreadPoolExecutor(2) as pool:
            wrong = dict(zip(names, pool.map(one_of, names), strict=True))
        heard = []
        for name, accept in (
            ("tcp", tcp.accept),
            ("unix", unix.accept),
            ("abstract", abstract.accept),
            ("udp", lambda: udp.recv(9)),
        ):
            try:
                accept()
                heard.append(name)
            except BlockingIOError:
                pass
        wrong["the world"] = f"something came through {heard}" if heard else ""
        wrong["the world"] += "" if victim.poll() is None else "a process outside was killed"
        wrong["the world"] += "".join(
            f"{p} was written" for p in ("/tmp", "/dev/shm", "/var/tmp") if Path(p, mark).exists()
        )
        wrong["the world"] += "" if sorted(os.listdir(folder)) == ["secret", "socket"] else "its folder was written"
        wrong["the world"] += "" if not running(mark) else "a daemon is left behind"
        return wrong
    finally:
        victim.kill()
        victim.wait()
        for one in (tcp, udp, unix, abstract):
            one.close()


def running(mark: str) -> list[int]:
    """Return the processes whose command line has the mark."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(name) != os.getpid() and mark.encode() in Path("/proc", name, "cmdline").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), list(PROGRAMS))))
