"""A metric of the user's own: ``python:FILE:FUNCTION``, called as f(answer, reference), which gives 0 to 1, or True and False.

``plan`` reads the file and runs nothing of it; a step loads it from where it lies, in this process: it is the user's own code. What
it says is part of a step's key by its digest, which is written behind the name (``python:checks.py:same@0123456789abcdef``). The
key knows this one file: what it imports is not in it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import numbers
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedistill.errors import StepFailed, UsageError

PREFIX = "python:"
NAME = re.compile(r"python:(?P<file>[^:@\n]+):(?P<function>[A-Za-z_]\w*)(?:@(?P<digest>[0-9a-f]{16}))?")


class MetricFailed(StepFailed):
    """A function of the user's failed; whoever knows the row says which one it was."""


def keyed_name(name: str, folder: Path) -> str:
    """Return the name of a metric as a step's key holds it, with the digest of what the file in ``folder`` says. Raises UsageError
    where the file or the function is missing, or is no Python. Nothing is run.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise UsageError(f"{name!r} names no function", 'write "python:FILE:FUNCTION", such as "python:checks.py:same"')
    path = folder / found["file"]
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}", f"write def {found['function']}(answer, reference): … there"
        ) from None
    try:
        tree = ast.parse(source, str(path))
        compile(tree, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UsageError(f"{path}{line}: no Python: {error}", f"python -m py_compile {path}") from None
    _check(tree, found["function"], path)
    return f"{PREFIX}{found['file']}:{found['function']}@{hashlib.sha256(source).hexdigest()[:16]}"


def _check(tree: ast.Module, function: str, path: Path) -> None:
    """Refuse a file without the function, and a function that two arguments do not fit. What a statement other than ``def`` gives
    the name to (an import, an assignment) is believed.
    """
    defined = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function]
    if not defined:
        if any(isinstance(one, ast.AsyncFunctionDef) and one.name == function for one in tree.body):
            raise UsageError(f"{path}: {function} is async", f"write def {function}(answer, reference): …")
        if function in {name for one in tree.body for name in _bound(one)}:
            return
        names = ", ".join(one.name for one in tree.body if isinstance(one, ast.FunctionDef)) or "none"
        raise UsageError(
            f"{path}: there is no function {function!r}",
            f"functions in it: {names}; write def {function}(answer, reference): …",
        )
    of = defined[-1].args
    places = len(of.posonlyargs) + len(of.args)
    needed = places - len(of.defaults)
    keywords = sum(default is None for default in of.kw_defaults)
    if needed > 2 or keywords or (places < 2 and of.vararg is None):
        raise UsageError(
            f"{path}:{defined[-1].lineno}: {function} is called as {function}(answer, reference), and does not take that",
            f"write def {function}(answer, reference): …",
        )


def _bound(statement: ast.stmt) -> list[str]:
    """Return the names that a statement of a module gives something to."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(one.asname or one.name).partition(".")[0] for one in statement.names]
    if isinstance(statement, ast.ClassDef):
        return [statement.name]
    return [one.id for one in ast.walk(statement) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]


def call(name: str, folder: Path, answer: str, reference: str) -> float:
    """Return what the function gives to an answer. Raises MetricFailed where it raises, or gives anything but 0 to 1."""
    found = NAME.fullmatch(name)
    assert found is not None
    where, path = f"{found['file']}: {found['function']}()", folder / found["file"]
    function = _load(path.absolute(), found["function"], found["digest"] or "")
    try:
        value = function(answer, reference)
    except Exception as error:  # whatever the user's code raises
        line = _line(error, path)
        raise MetricFailed(f"{where} raised {type(error).__name__}{line}: {error}", f"mend {path}") from error
    # numbers.Real: numpy's are good, too; its booleans are none, and know no comparison with a range
    if type(value).__name__ in ("bool", "bool_"):
        return float(value)
    if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise MetricFailed(f"{where} gave {value!r:.80}, and not a number from 0 to 1, True or False", f"mend {path}")
    return float(value)


def _line(error: BaseException, path: Path) -> str:
    """Return the line of the user's file that an error came from, as " in line 7"; "" where it came from elsewhere."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path.absolute():
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" in line {lines[-1]}" if lines else ""


@functools.lru_cache(maxsize=16)
def _load(path: Path, function: str, digest: str) -> Callable[[str, str], Any]:
    """Load a file as a module of its own, once for each content."""
    where = f"{path.name}: {function}()"
    try:
        if digest and hashlib.sha256(path.read_bytes()).hexdigest()[:16] != digest:
            raise MetricFailed(f"{path} has changed since the build was planned", "build again")
        spec = importlib.util.spec_from_file_location(f"edgedistill_metric_{digest}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        sys.path.insert(0, str(path.parent))  # a file beside it may be imported
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        found = getattr(module, function, None)
    except MetricFailed:
        raise
    except Exception as error:  # whatever the user's code raises
        raise MetricFailed(
            f"{where} cannot be loaded: {type(error).__name__}{_line(error, path)}: {error}", f"mend {path}"
        ) from error
    if not callable(found):
        raise MetricFailed(f"{where} is no function, but {type(found).__name__}", f"mend {path}")
    return found
