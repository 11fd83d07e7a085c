"""On which line each key of a TOML file stands: tomllib forgets it, so a small scanner walks the same text once more.

It runs only on text that tomllib has accepted, and may therefore be lax about everything but positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Key = tuple[str | int, ...]


def key_lines(text: str) -> dict[Key, int]:
    """Map every key of valid TOML ``text`` to its line, from 1; items of lists have their index in the key."""
    return _Scanner(text).scan()


_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRINGS = {
    '"""': re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}', re.DOTALL),
    "'''": re.compile(r"'''.*?'{3,5}", re.DOTALL),
    '"': re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    "'": re.compile(r"'[^'\n]*'"),
}


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Key, int] = {}
        self.tables: dict[Key, int] = {}  # how many [[tables]] each array of tables has so far

    def scan(self) -> dict[Key, int]:
        prefix: Key = ()
        self.skip()
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                prefix = self.header()
            else:
                self.pair(prefix)
            self.skip()
        return self.lines

    def skip(self) -> None:
        blank = _BLANK.match(self.text, self.at)
        self.at = blank.end() if blank else self.at

    def note(self, key: Key) -> None:
        line = self.text.count("\n", 0, self.at) + 1
        for depth in range(1, len(key) + 1):
            self.lines.setdefault(key[:depth], line)

    def header(self) -> Key:
        start, many = self.at, self.text.startswith("[[", self.at)
        self.at += 2 if many else 1
        parts, key = self.dotted(), ()
        for depth, part in enumerate(parts):
            key = (*key, part)
            if many and depth == len(parts) - 1:
                self.tables[key] = self.tables.get(key, 0) + 1
            if key in self.tables:
                key = (*key, self.tables[key] - 1)
        end, self.at = self.at + (2 if many else 1), start
        self.note(key)
        self.lines[key] = self.text.count("\n", 0, start) + 1  # also when its own [table.child] came first
        self.at = end
        return key

    def pair(self, prefix: Key) -> None:
        start = self.at
        parts = self.dotted()
        end, self.at = self.at, start
        key = (*prefix, *parts)
        self.note(key)
        self.at = end + 1  # the equals sign
        self.value(key)

    def dotted(self) -> list[str]:
        parts: list[str] = []
        while True:
            self.skip()
            bare = _BARE.match(self.text, self.at)
            if bare:
                parts.append(bare.group())
                self.at = bare.end()
            else:
                parts.append(self.string())
            self.skip()
            if not self.text.startswith(".", self.at):
                return parts
            self.at += 1

    def string(self) -> str:
        for quote, pattern in _STRINGS.items():
            found = pattern.match(self.text, self.at) if self.text.startswith(quote, self.at) else None
            if found:
                self.at = found.end()
                return found.group()[len(quote) : -len(quote)]
        self.at += 1  # never on text that tomllib took; moving on keeps the scan finite
        return ""

    def value(self, key: Key) -> None:
        self.skip()
        first = self.text[self.at : self.at + 1]
        if first == "[":
            self.at += 1
            self.skip()
            index = 0
            while self.at < len(self.text) and self.text[self.at] != "]":
                self.note((*key, index))
                self.value((*key, index))
                index += 1
                self.comma()
            self.at += 1
        elif first == "{":
            self.at += 1
            self.skip()
            while self.at < len(self.text) and self.text[self.at] != "}":
                self.pair(key)
                self.comma()
            self.at += 1
        elif first in ('"', "'"):
            self.string()
        else:
            scalar = _SCALAR.match(self.text, self.at)
            self.at = max(scalar.end() if scalar else 0, self.at + 1)

    def comma(self) -> None:
        self.skip()
        if self.text.startswith(",", self.at):
            self.at += 1
        self.skip()


def line_of(key: Key, lines: Mapping[Key, int]) -> int | None:
    """Return the line of a key, or of the nearest table around it; None where none of them stands in the file."""
    return next((lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in lines), None)
