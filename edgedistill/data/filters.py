"""What makes an answer not worth learning from, beside being wrong: its form, what it gives away, and what was seen before.

Each function says why in a few words, or "" where nothing is wrong. ``stages/filter.py`` applies them in the recipe's order.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedistill.data.prompts import Row
from edgedistill.data.thinking import split
from edgedistill.errors import UsageError
from edgedistill.evals.mathematics import last_number, numbers_in, same_number
from edgedistill.evals.metrics import normalised_text
from edgedistill.sequences import Aside

if TYPE_CHECKING:
    import numpy as np

REFUSALS = re.compile(
    r"^\W*(?:(?:i'?m|i am|we'?re)\s+(?:(?:very|really|so|truly)\s+)?(?:unable|not able) to\b"
    r"|(?:i'?m|i am|we'?re)\s+(?:(?:very|really|so|truly)\s+)?(?:sorry|afraid)\b.{0,20}"
    r"\b(?:can'?t|cannot|can not|unable|not able|won'?t)\b"
    r"|(?:sorry|apologies|unfortunately)\b.{0,40}\b(?:can'?t|cannot|can not|unable|not able|won'?t)\b"
    r"|i\s+(?:must decline|have to decline|(?:do not|don'?t) feel comfortable)\b"
    r"|i\s+(?:can'?t|cannot|can not|won'?t|will not)\s+(?:be able to\s+)?(?:help|assist|provide|do|give|offer|share|answer|comply|"
    r"fulfil+|discuss|support|create|generate|write|engage|participate|tell you|show you|access|browse|open|see)\b"
    r"|as an? (?:ai|artificial intelligence|language model|large language model|assistant)\b.{0,80}"
    r"\b(?:can'?t|cannot|can not|unable|not able|don'?t|do not|won'?t)\b"
    r"|my (?:apologies|programming|guidelines)\b.{0,40}\b(?:can'?t|cannot|prevent|forbid|not allow))",
    re.IGNORECASE | re.DOTALL,
)
"""How English answers begin that refuse; typed apostrophes are made straight first."""

LOCAL = re.compile(r"[\w.+-]++@|[\w.+-]++")
"""What may stand before the @ of an e-mail address, and all else of its kind, so that a text is read once."""
DOMAIN, WORD_EDGE = re.compile(r"(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}\b"), re.compile(r"\b")
RESERVED = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net|edu)|[\w-]+\.(?:example|invalid|test)|localhost)$", re.I
)
"""Domains that belong to nobody (RFC 2606)."""
CARD = re.compile(r"(?<![\w.-])(?:\d[ -]?){13,19}(?![\w-])")
ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|(?:222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|35\d{14}|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}"
)
"""First digits and lengths of the card issuers' numbers."""
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b")
SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
)
FICTION = re.compile(r"555\D{0,2}01\d\d$")
"""Telephone numbers that are kept for fiction (555-0100 to 555-0199)."""

SHARE, SIMILARITY, COPIED_WORDS = 0.5, 0.8, 8
"""What the filters agreement, duplicates and decontaminate go by unless a recipe says otherwise."""
SHINGLE = 3  # words
SHORT = 8
"""Words of an answer that a block of thinking may be asked to hold as they stand."""
PERMUTATIONS = 128
PRIME = (1 << 31) - 1


# ── one answer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def malformed(
    text: str,
    *,
    min_chars: int = 0,
    max_chars: int | None = None,
    pattern: str | None = None,
    validator: Callable[[str], str] | None = None,
) -> str:
    """Say in what an answer's form is not the wanted one: length in characters, a regular expression that must be found in it,
    and a JSON Schema (`schema_validator`).
    """
    length = len(text.strip())
    if length < min_chars:
        return f"under {min_chars} characters"
    if max_chars is not None and length > max_chars:
        return f"over {max_chars} characters"
    if pattern is not None and not re.search(pattern, text):
        return "does not have the pattern"
    return validator(text) if validator is not None else ""


def schema_validator(schema: dict[str, Any]) -> Callable[[str], str]:
    """Return what says how a text is no JSON that a schema allows. Raises UsageError for what is no JSON Schema."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UsageError(f"no JSON Schema: {error.message}", "https://json-schema.org/learn has examples") from None
    if wrong := next((ref for ref in _references(schema) if not _resolves(schema, ref)), None):
        raise UsageError(f"no JSON Schema: $ref {wrong!r} leads nowhere in it", "write what it refers to under $defs")
    checker = kind(schema)

    def check(text: str) -> str:
        try:
            value = json.loads(text)
            error = next(iter(checker.iter_errors(value)), None)
        except (ValueError, RecursionError):
            return "no JSON"
        if error is None:
            return ""
        where = "/".join(str(step) for step in error.absolute_path)
        return f"not by the schema{f' at {where}' if where else ''}: {error.validator}"

    return check


def _references(value: Any) -> Iterable[str]:
    """Yield the references in a schema."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def _resolves(schema: Any, reference: str) -> bool:
    """Tell whether a reference leads to a place in the schema; nothing is fetched."""
    if not reference.startswith("#"):
        return False
    place = schema
    for step in filter(None, reference[1:].split("/")):
        name = step.replace("~1", "/").replace("~0", "~")
        place = place.get(name) if isinstance(place, dict) else None
        if place is None:
            return False
    return True


def supports(text: str) -> bool:
    """Tell whether the block of a text comes to its answer, as far as that can be read.

    A short answer has to stand in the block, but for case, punctuation and articles; or the block's last number is the answer's. Of
    a longer answer the last number has to be one of the block's; without a number it passes, as there is nothing to look for.
    """
    thought = split(text)
    block, answer = thought.thinking or "", thought.answer
    number, plain = last_number(answer), normalised_text(answer)
    if len(plain.split()) > SHORT:
        return number is None or any(same_number(number, one) for one in numbers_in(block))
    if plain and f" {plain} " in f" {normalised_text(block)} ":
        return True
    end = last_number(block)
    return number is not None and end is not None and same_number(number, end)


def refuses(text: str) -> bool:
    """Tell whether an English answer begins with a refusal."""
    return bool(REFUSALS.search(text[:400].replace("\u2019", "'")))


def personal(text: str) -> str:
    """Name what a text tells of a person: an e-mail address, a telephone, card, bank or social security number. Numbers with
    check digits are checked, and addresses and numbers that are kept for examples are nobody's.
    """
    if "@" in text and any(not RESERVED.search(f"@{domain}") for domain in domains(text)):
        return "e-mail address"
    if any(_card(re.sub(r"\D", "", found.group())) for found in CARD.finditer(text)):
        return "card number"
    if any(_account(found.group().replace(" ", "")) for found in IBAN.finditer(text)):
        return "bank account"
    if SSN.search(text):
        return "social security number"
    if any(not FICTION.search(found.group()) for found in PHONE.finditer(text)):
        return "telephone number"
    return ""


def domains(text: str) -> Iterator[str]:
    """Yield the domains of the e-mail addresses in a text: what ``\\b[\\w.+-]+@DOMAIN`` finds, in a time that grows with the length
    and not with its square.
    """
    end = 0  # of the address before
    for part in LOCAL.finditer(text):
        at, begin = part.end() - 1, max(part.start(), end)  # no address begins in the one before, or without a word
        if text[at] != "@" or begin >= at or not WORD_EDGE.search(text, begin, at):
            continue
        if domain := DOMAIN.match(text, at + 1):
            end = domain.end()
            yield domain.group()


def _card(digits: str) -> bool:
    """Tell whether digits begin with a card number: what is written after it may have been read along."""
    return any(_luhn(digits[:length]) for length in range(13, len(digits) + 1))


def _account(text: str) -> bool:
    """Tell whether a text begins with an account number."""
    return any(_iban(text[:length]) for length in range(15, len(text) + 1))


def _luhn(digits: str) -> bool:
    """Check a card number (ISO/IEC 7812)."""
    if not ISSUERS.fullmatch(digits):
        return False
    doubled = [2 * int(digit) if at % 2 else int(digit) for at, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


def _iban(text: str) -> bool:
    """Check an account number (ISO 13616)."""
    if not 15 <= len(text) <= 34:
        return False
    moved = text[4:] + text[:4]
    return int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


# ── answers to one prompt ───────────────────────────────────────────────────────────────────────────────────────────


def agreeing(texts: Sequence[str], same: Callable[[str, str], bool], share: float, asked: int) -> list[bool]:
    """Tell which answers to one prompt are those that most of them give, at least ``share`` of all that were ``asked`` for
    (self-consistency, arXiv:2203.11171): one that did not end, or was dropped before, agrees with none. Where two camps are as
    large, none is believed.
    """
    camps: list[list[int]] = []
    for at, text in enumerate(texts):
        for camp in camps:
            if same(text, texts[camp[0]]):
                camp.append(at)
                break
        else:
            camps.append([at])
    camps.sort(key=len, reverse=True)
    tied = len(camps) > 1 and len(camps[0]) == len(camps[1])
    most = camps[0] if camps and not tied and len(camps[0]) >= share * asked else []
    return [at in most for at in range(len(texts))]


# ── answers and what was seen before ────────────────────────────────────────────────────────────────────────────────


def words_of(text: str) -> list[str]:
    """Return the words of a text, lower-case and without punctuation; each letter of a script without spaces is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+", text.casefold())


class Seen:
    """Find texts that are nearly the same as one before: words in threes, compared by MinHash and then in full.

    ``similarity`` is the share of threes that two texts have in common (Jaccard), from which on they count as the same. In memory a
    text that was kept is 32 bits of the hash of each band with its number, 8 bytes in sorted arrays (21 bands, 168 bytes, at a
    similarity of 0.8); its threes lie in a nameless file in ``folder``. Sources: Broder 1997; Lee et al. 2022 (arXiv:2107.06499).
    """

    def __init__(self, similarity: float, folder: Path | None = None) -> None:
        import numpy as np

        self.similarity = similarity
        rng = np.random.Generator(np.random.Philox(0))
        self._a = rng.integers(1, PRIME, PERMUTATIONS, dtype=np.uint64)
        self._b = rng.integers(0, PRIME, PERMUTATIONS, dtype=np.uint64)
        self._rows = band_rows(similarity)
        bands = PERMUTATIONS // self._rows
        self._mix = rng.integers(0, 1 << 64, (bands, self._rows), dtype=np.uint64) | np.uint64(1)
        self._bands = _Bands()
        self._kept = Aside(folder)  # the threes of each text that was kept: uint32 [threes]

    def before(self, text: str) -> bool:
        """Tell whether a text is nearly one that was seen; if not, it is from now on."""
        import numpy as np

        threes = self._threes(text)
        hashes = ((threes[:, None] * self._a + self._b) % np.uint64(PRIME)).min(axis=0)
        cut = hashes[: self._mix.size].reshape(self._mix.shape)
        keys = ((cut * self._mix).sum(axis=1) >> np.uint64(32)).tolist()  # multiply-shift (Dietzfelbinger et al. 1997)
        for number in sorted(self._bands.met(keys)):
            other = np.frombuffer(self._kept[number], dtype=np.uint32)
            if min(len(threes), len(other)) < self.similarity * max(len(threes), len(other)):
                continue
            common = len(np.intersect1d(threes, other, assume_unique=True))
            if common >= self.similarity * (len(threes) + len(other) - common):
                return True
        self._bands.add(keys, len(self._kept))
        self._kept.add(threes.astype(np.uint32).tobytes())  # under PRIME, so 31 bits
        return False

    def _threes(self, text: str) -> np.ndarray:
        """Return the distinct threes of words as numbers under PRIME: uint64 [threes]."""
        import numpy as np

        words = words_of(text) or [text.strip()]
        codes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
        found = np.asarray([*codes, *[0] * max(0, SHINGLE - len(codes))], dtype=np.uint64) % np.uint64(PRIME)
        mixed = np.zeros(len(found) - SHINGLE + 1, dtype=np.uint64)
        for at in range(SHINGLE):
            mixed = (mixed * np.uint64(1_000_003) + found[at : at + len(mixed)]) % np.uint64(PRIME)
        return np.unique(mixed)


class _Bands:
    """Map hashes of bands (32 bits) to the numbers of the texts that have them: the newest in a dictionary, the others in sorted
    arrays of hash and number in one, of which each is at least twice as long as the next (a log-structured merge). An array grows
    and is sorted where it lies, so that a merge takes no memory of its own.
    """

    NEWEST = 1 << 13  # hashes in the dictionary, at most: it takes 200 bytes for each

    def __init__(self) -> None:
        self._new: dict[int, list[int]] = {}
        self._count = 0
        self._sorted: list[np.ndarray] = []

    def met(self, keys: Sequence[int]) -> set[int]:
        """Return the numbers of the texts with one of these hashes."""
        import numpy as np

        found = {number for key in keys for number in self._new.get(key, ())}
        low = np.asarray(keys, dtype=np.uint64) << np.uint64(32)
        for pairs in self._sorted:
            starts, ends = (
                np.searchsorted(pairs, low),
                np.searchsorted(pairs, low | np.uint64(0xFFFF_FFFF), side="right"),
            )
            for at in np.flatnonzero(starts < ends):
                found.update((pairs[starts[at] : ends[at]] & np.uint64(0xFFFF_FFFF)).tolist())
        return found

    def add(self, keys: Iterable[int], number: int) -> None:
        """Note that a text has these hashes."""
        for key in keys:
            self._new.setdefault(key, []).append(number)
            self._count += 1
        if self._count >= self.NEWEST:
            self._merge()

    def _merge(self) -> None:
        """Put what is new into the arrays."""
        import numpy as np

        pairs = np.asarray([key << 32 | one for key, numbers in self._new.items() for one in numbers], dtype=np.uint64)
        self._new, self._count = {}, 0
        while self._sorted and len(self._sorted[-1]) < 2 * len(pairs):
            older = self._sorted.pop()
            older.resize(len(older) + len(pairs), refcheck=False)
            older[-len(pairs) :] = pairs
            pairs = older
        pairs.sort()
        self._sorted.append(pairs)


def band_rows(similarity: float) -> int:
    """Return the most rows of a band with which texts that are just similar enough meet in 99 of 100 cases."""
    found = 1
    for rows in range(1, 17):
        if (1 - similarity**rows) ** (PERMUTATIONS // rows) <= 0.01:
            found = rows
    return found


class Contamination:
    """Find text of the suites in what is to be taught: ``words`` words in a row that stand in a suite's prompts or references, or a
    whole shorter prompt. What every row says (a system message) is no test, and neither are words in a row that stand in a
    tenth of the suite's rows: they are its template.
    """

    def __init__(self, suites: Mapping[str, Sequence[Row]], words: int) -> None:
        self.words = words
        self._grams: dict[tuple[str, ...], str] = {}
        self._whole: dict[tuple[str, ...], str] = {}
        for name, rows in suites.items():
            counts: dict[tuple[str, ...], int] = {}
            first: dict[tuple[str, ...], str] = {}
            for row in rows:
                where = f"{name} {row.id}"
                found: set[tuple[str, ...]] = set()
                for text in tested(row):
                    found |= set(self._cut(words_of(text)))
                for text in asked_in(row):
                    cut = words_of(text)
                    if 0 < len(cut) < words:
                        self._whole.setdefault(tuple(cut), where)
                for gram in found:
                    counts[gram] = counts.get(gram, 0) + 1
                    first.setdefault(gram, where)
            common = max(2, len(rows) // 10)
            self._grams |= {gram: where for gram, where in first.items() if counts[gram] <= common}

    def found_in(self, texts: Iterable[str]) -> str:
        """Name the suite and the row whose text stands in one of these; "" where none does."""
        for text in texts:
            cut = words_of(text)
            if (where := self._whole.get(tuple(cut))) is not None:
                return where
            for gram in self._cut(cut):
                if (where := self._grams.get(gram)) is not None:
                    return where
        return ""

    def _cut(self, words: list[str]) -> Iterable[tuple[str, ...]]:
        return (tuple(words[at : at + self.words]) for at in range(len(words) - self.words + 1))


def asked_in(row: Row) -> list[str]:
    """Return what users say in a row."""
    return [str(message.get("content") or "") for message in row.messages if message["role"] == "user"]


def tested(row: Row) -> list[str]:
    """Return what a suite's row tests by: what users say in it, and its reference, of which a short one gives no words in a row."""
    return [*asked_in(row), *([row.reference] if row.reference else [])]
