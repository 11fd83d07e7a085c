"""Every error that a user can cause or mend, in one tree.

    EdgeDistillError            exit 1   a bug of ours, or something nobody foresaw
    ├── UsageError              exit 2   the command line, a file or a model that we were given is unusable
    │   └── RecipeError         exit 2   the same in a TOML file, with file, line and key
    ├── StepFailed              exit 3   a step of the build ran and failed; what other steps computed is kept
    └── GateMissed              exit 4   built and measured, but below a gate (or unproved under --require-proof)

An error has a message that names the file and the key, and a ``hint``: the next command to type, or what to change.
The CLI prints both and exits with ``exit_code``; a traceback is shown for a bug only (or under ``-v``).
"""

from __future__ import annotations

from pathlib import Path


class EdgeDistillError(Exception):
    """Base of the tree. ``str(error)`` is the message; ``error.hint`` says what to do next (may be empty)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgeDistillError):
    """Something the user handed us cannot be used: a flag, a path, a model, a data file."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or target file is wrong. Shown as ``file:line: key: message``; ``said`` is the message alone. Of a key that the
    command line gave, ``file`` is ``--set KEY``.
    """

    def __init__(
        self, message: str, hint: str = "", *, file: Path | str | None = None, line: int | None = None, key: str = ""
    ) -> None:
        where = f"{file}:{line}" if file and line else str(file or "")
        named = "" if where == f"--set {key}" else key
        super().__init__(": ".join(part for part in (where, named, message) if part), hint)
        self.file, self.line, self.key, self.said = file, line, key, message


class StepFailed(EdgeDistillError):
    """A step ran and failed. Nothing of it is cached; everything finished before it stays."""

    exit_code = 3


class GateMissed(EdgeDistillError):
    """The artifact was built and measured, and is not good enough to ship."""

    exit_code = 4
