"""Run an answer's code and then its row's tests, in the sandbox (``data/sandbox.py``, ``Sandbox.judge``).

Given to ``python -c`` with four descriptors: the code, where the tests will be, where to write, and where to wait. The tests, and
the number to write when all of them passed, are put there only after the code has run: code that exits, prints or raises
before can write nothing that counts.
"""

import builtins
import os
import sys
import threading
import traceback


def main(code: int, tests: int, verdict: int, turn: int) -> None:
    """Run both as the module ``answer`` (so ``if __name__ == "__main__":`` does not run). Ends the process."""
    # Kept here, for the code may replace what modules and builtins have.
    write, read, pread, leave = os.write, os.read, os.pread, os._exit
    for fd in (code, tests, verdict, turn):
        os.set_inheritable(fd, False)
    names = builtins.__dict__
    known = dict(names)
    module = type(sys)("answer")
    sys.modules["answer"] = module
    sys.argv = ["answer.py"]
    try:
        with open(code, encoding="utf-8", errors="surrogatepass") as file:
            text = file.read()
        exec(compile(text, "answer.py", "exec"), module.__dict__)
        for name in [name for name in names if name not in known]:
            delattr(builtins, name)
        names.update(known)
        module.__dict__["__builtins__"] = builtins
        sys.settrace(None)
        sys.setprofile(None)
        threading.settrace(None)  # pyright: ignore[reportArgumentType]
        write(verdict, b"\n")
        read(turn, 1)
        found, more = b"", b"-"
        while more:
            more = pread(tests, 65536, len(found))
            found += more
        exec(compile(found[32:].decode("utf-8", "surrogatepass"), "tests.py", "exec"), module.__dict__)
        sys.stdout.flush()
        write(verdict, found[:32])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        leave(1)
    leave(0)


main(*map(int, sys.argv[1:]))
