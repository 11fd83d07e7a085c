"""The steps that the tasks of the recipe ``code`` are made of: how one is worded, how it is written, and what it does.

``code`` is what a reference is made of, ``does`` what its tests are made of: two hands, so that a test can catch a wrong reference.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["numbers", "text", "number"]
LETTERS = tuple("aeiorstnlc")
SMALL = (2, 3, 4)
SIZES = tuple(range(2, 10))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing to do to a value. ``say`` are wordings that train has, ``ood`` those that it has not; ``{k}`` and ``{j}`` in them
    and in ``code`` are drawn from ``values``, ``{v}`` is the argument. ``last`` steps give something else than they take.
    """

    takes: Kind
    say: tuple[str, ...]
    ood: tuple[str, ...]
    code: str
    does: Callable[..., Any]
    values: tuple[Any, ...] = ()
    two: bool = False  # {j}, another value, is drawn, too
    last: bool = False


NUMBERS = {
    "above": Step(
        takes="numbers",
        say=("keep the numbers greater than {k}", "keep only what is greater than {k}"),
        ood=("throw out everything that does not exceed {k}", "drop all that are {k} or under"),
        code="[x for x in {v} if x > {k}]",
        does=lambda v, k: list(filter(k.__lt__, v)),
        values=SIZES,
    ),
    "below": Step(
        takes="numbers",
        say=("keep the numbers less than {k}", "keep only what is less than {k}"),
        ood=("throw out everything from {k} upwards", "drop all that are {k} or over"),
        code="[x for x in {v} if x < {k}]",
        does=lambda v, k: list(filter(k.__gt__, v)),
        values=SIZES,
    ),
    "multiples": Step(
        takes="numbers",
        say=("keep the multiples of {k}", "keep the numbers that {k} divides"),
        ood=("retain whatever can be divided by {k}", "hold on to the ones in the table of {k}"),
        code="[x for x in {v} if x % {k} == 0]",
        does=lambda v, k: [x for x in v if x // k * k == x],
        values=(3, 4, 5, 6, 7),
    ),
    "even": Step(
        takes="numbers",
        say=("keep the even numbers", "keep only even numbers"),
        ood=("throw out whatever is odd", "drop the odd ones"),
        code="[x for x in {v} if x % 2 == 0]",
        does=lambda v: [x for x in v if not x & 1],
    ),
    "odd": Step(
        takes="numbers",
        say=("keep the odd numbers", "keep only odd numbers"),
        ood=("throw out whatever is even", "drop the even ones"),
        code="[x for x in {v} if x % 2 == 1]",
        does=lambda v: [x for x in v if x & 1],
    ),
    "plus": Step(
        takes="numbers",
        say=("add {k} to every number", "add {k} to each number"),
        ood=("raise all of them by {k}", "make each one {k} larger"),
        code="[x + {k} for x in {v}]",
        does=lambda v, k: list(map(k.__add__, v)),
        values=SIZES,
    ),
    "minus": Step(
        takes="numbers",
        say=("subtract {k} from every number", "subtract {k} from each number"),
        ood=("lower all of them by {k}", "make each one {k} smaller"),
        code="[x - {k} for x in {v}]",
        does=lambda v, k: list(map((-k).__add__, v)),
        values=SIZES,
    ),
    "times": Step(
        takes="numbers",
        say=("multiply every number by {k}", "multiply each number by {k}"),
        ood=("make each one {k} times as large", "scale all of them by {k}"),
        code="[x * {k} for x in {v}]",
        does=lambda v, k: list(map(k.__mul__, v)),
        values=SIZES,
    ),
    "square": Step(
        takes="numbers",
        say=("square every number", "square each number"),
        ood=("multiply each one by itself", "raise all of them to the power of two"),
        code="[x * x for x in {v}]",
        does=lambda v: [x**2 for x in v],
    ),
    "negate": Step(
        takes="numbers",
        say=("change the sign of every number", "change the sign of each number"),
        ood=("turn positive ones negative and the other way round", "negate all of them"),
        code="[-x for x in {v}]",
        does=lambda v: [0 - x for x in v],
    ),
    "absolute": Step(
        takes="numbers",
        say=("take the absolute value of every number", "take the absolute value of each number"),
        ood=("strip the minus signs off", "replace each one by its distance from zero"),
        code="[abs(x) for x in {v}]",
        does=lambda v: [max(x, -x) for x in v],
    ),
    "rise": Step(
        takes="numbers",
        say=("sort the list in ascending order", "sort it in ascending order"),
        ood=("put the smallest in front, up to the largest", "order them from low to high"),
        code="sorted({v})",
        does=lambda v: sorted(v),
    ),
    "fall": Step(
        takes="numbers",
        say=("sort the list in descending order", "sort it in descending order"),
        ood=("put the largest in front, down to the smallest", "order them from high to low"),
        code="sorted({v}, reverse=True)",
        does=lambda v: sorted(v)[::-1],
    ),
    "turn": Step(
        takes="numbers",
        say=("reverse the list", "reverse the order of the list"),
        ood=("turn the list around", "put the last one in front, back to the first"),
        code="{v}[::-1]",
        does=lambda v: list(reversed(v)),
    ),
    "first": Step(
        takes="numbers",
        say=("take the first {k} numbers", "take only the first {k} numbers"),
        ood=("cut off all but the {k} at the front", "stop after {k} of them"),
        code="{v}[:{k}]",
        does=lambda v, k: [x for at, x in enumerate(v) if at < k],
        values=SMALL,
    ),
    "final": Step(
        takes="numbers",
        say=("take the last {k} numbers", "take only the last {k} numbers"),
        ood=("cut off all but the {k} at the end", "use just the {k} at the back"),
        code="{v}[-{k}:]",
        does=lambda v, k: [x for at, x in enumerate(v) if at >= len(v) - k],
        values=SMALL,
    ),
    "skip": Step(
        takes="numbers",
        say=("skip the first {k} numbers", "leave out the first {k} numbers"),
        ood=("begin after {k} of them", "cut {k} off at the front"),
        code="{v}[{k}:]",
        does=lambda v, k: [x for at, x in enumerate(v) if at >= k],
        values=SMALL,
    ),
    "unique": Step(
        takes="numbers",
        say=("remove the duplicates", "remove duplicates and keep the order"),
        ood=("let nothing stand twice, in the order of first sight", "throw out repeats"),
        code="list(dict.fromkeys({v}))",
        does=lambda v: [x for at, x in enumerate(v) if x not in v[:at]],
    ),
    "sum": Step(
        takes="numbers",
        say=("compute the sum", "add all numbers up"),
        ood=("total them", "find what they come to together"),
        code="sum({v})",
        does=lambda v: functools.reduce(operator.add, v),
        last=True,
    ),
    "count": Step(
        takes="numbers",
        say=("count the numbers", "count how many numbers there are"),
        ood=("tell how long the list is", "find how many are there"),
        code="len({v})",
        does=lambda v: sum(1 for _ in v),
        last=True,
    ),
    "largest": Step(
        takes="numbers",
        say=("find the largest number", "take the largest number"),
        ood=("pick the one that no other exceeds", "pick the maximum"),
        code="max({v})",
        does=lambda v: sorted(v)[-1],
        last=True,
    ),
    "smallest": Step(
        takes="numbers",
        say=("find the smallest number", "take the smallest number"),
        ood=("pick the one that no other is under", "pick the minimum"),
        code="min({v})",
        does=lambda v: sorted(v)[0],
        last=True,
    ),
    "spread": Step(
        takes="numbers",
        say=("compute the largest minus the smallest number", "subtract the smallest number from the largest"),
        ood=("find how far the extremes lie apart", "compute the range from minimum to maximum"),
        code="max({v}) - min({v})",
        does=lambda v: sorted(v)[-1] - sorted(v)[0],
        last=True,
    ),
}
TEXT = {
    "upper": Step(
        takes="text",
        say=("change it to upper case", "change all letters to upper case"),
        ood=("make capitals of all letters", "write it in capitals"),
        code="{v}.upper()",
        does=lambda v: "".join(chr(ord(c) - 32) if "a" <= c <= "z" else c for c in v),
    ),
    "lower": Step(
        takes="text",
        say=("change it to lower case", "change all letters to lower case"),
        ood=("make small letters of all capitals", "write it without capitals"),
        code="{v}.lower()",
        does=lambda v: "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in v),
    ),
    "turn": Step(
        takes="text",
        say=("reverse it", "reverse the order of its characters"),
        ood=("turn it around", "write it backwards"),
        code="{v}[::-1]",
        does=lambda v: "".join(reversed(v)),
    ),
    "spaces": Step(
        takes="text",
        say=("remove all spaces", "remove the spaces"),
        ood=("close the gaps between words", "write its words without gaps"),
        code='{v}.replace(" ", "")',
        does=lambda v: "".join(v.split(" ")),
    ),
    "swap": Step(
        takes="text",
        say=('replace "{k}" by "{j}"', 'replace every "{k}" by "{j}"'),
        ood=('put "{j}" wherever there is "{k}"', 'let each "{k}" become "{j}"'),
        code='{v}.replace("{k}", "{j}")',
        does=lambda v, k, j: j.join(v.split(k)),
        values=LETTERS,
        two=True,
    ),
    "drop": Step(
        takes="text",
        say=('remove every "{k}"', 'remove all "{k}"'),
        ood=('leave no "{k}" in it', 'strike out each "{k}"'),
        code='{v}.replace("{k}", "")',
        does=lambda v, k: "".join(c for c in v if c != k),
        values=LETTERS,
    ),
    "vowels": Step(
        takes="text",
        say=("remove the vowels", "remove all vowels"),
        ood=("strike out a, e, i, o and u in either case", "leave no vowel in it"),
        code='"".join(c for c in {v} if c not in "aeiouAEIOU")',
        does=lambda v: v.translate(dict.fromkeys(map(ord, "aeiouAEIOU"))),
    ),
    "letters": Step(
        takes="text",
        say=("keep only the letters", "keep the letters"),
        ood=("throw out whatever is no letter", "strike out spaces and digits"),
        code='"".join(c for c in {v} if c.isalpha())',
        does=lambda v: "".join(c for c in v if "a" <= c.lower() <= "z"),
    ),
    "first": Step(
        takes="text",
        say=("take the first {k} characters", "take only the first {k} characters"),
        ood=("cut off all but {k} characters at the front", "stop after {k} characters"),
        code="{v}[:{k}]",
        does=lambda v, k: "".join(c for at, c in enumerate(v) if at < k),
        values=SIZES,
    ),
    "final": Step(
        takes="text",
        say=("take the last {k} characters", "take only the last {k} characters"),
        ood=("cut off all but {k} characters at the end", "use just the {k} characters at the back"),
        code="{v}[-{k}:]",
        does=lambda v, k: "".join(c for at, c in enumerate(v) if at >= len(v) - k),
        values=SIZES,
    ),
    "skip": Step(
        takes="text",
        say=("skip the first {k} characters", "leave out the first {k} characters"),
        ood=("begin after {k} characters", "cut {k} characters off at the front"),
        code="{v}[{k}:]",
        does=lambda v, k: "".join(c for at, c in enumerate(v) if at >= k),
        values=SIZES,
    ),
    "repeat": Step(
        takes="text",
        say=("repeat it {k} times", "repeat the whole {k} times"),
        ood=("write {k} copies of it one after another", "string {k} copies together"),
        code="{v} * {k}",
        does=lambda v, k: "".join([v] * k),
        values=SMALL,
    ),
    "length": Step(
        takes="text",
        say=("count its characters", "count how many characters it has"),
        ood=("tell how long it is", "find its length"),
        code="len({v})",
        does=lambda v: sum(1 for _ in v),
        last=True,
    ),
    "letter": Step(
        takes="text",
        say=('count how often "{k}" is in it', 'count every "{k}"'),
        ood=('tell how many times "{k}" appears', 'find the number of "{k}"'),
        code='{v}.count("{k}")',
        does=lambda v, k: sum(c == k for c in v),
        values=LETTERS,
        last=True,
    ),
    "words": Step(
        takes="text",
        say=("count its words", "count how many words it has"),
        ood=("tell how many words stand in it", "find the number of words"),
        code="len({v}.split())",
        does=lambda v: len([word for word in v.split(" ") if word]),
        last=True,
    ),
    "split": Step(
        takes="text",
        say=("split it into a list of words", "split it into words"),
        ood=("make a list with each of its words", "cut it up at the gaps"),
        code="{v}.split()",
        does=lambda v: [word for word in v.split(" ") if word],
        last=True,
    ),
    "starts": Step(
        takes="text",
        say=('check whether it starts with "{k}"', 'check if it starts with "{k}"'),
        ood=('tell whether "{k}" is at the very front', 'find out if its first character is "{k}"'),
        code='{v}.startswith("{k}")',
        does=lambda v, k: v[:1] == k,
        values=LETTERS,
        last=True,
    ),
}
NUMBER = {
    "plus": Step(
        takes="number",
        say=("add {k} to it", "add {k}"),
        ood=("raise it by {k}", "make it {k} larger"),
        code="{v} + {k}",
        does=lambda v, k: v.__add__(k),
        values=SIZES,
    ),
    "minus": Step(
        takes="number",
        say=("subtract {k} from it", "subtract {k}"),
        ood=("lower it by {k}", "make it {k} smaller"),
        code="{v} - {k}",
        does=lambda v, k: v.__sub__(k),
        values=SIZES,
    ),
    "times": Step(
        takes="number",
        say=("multiply it by {k}", "multiply by {k}"),
        ood=("make it {k} times as large", "scale it by {k}"),
        code="{v} * {k}",
        does=lambda v, k: v.__mul__(k),
        values=SIZES,
    ),
    "square": Step(
        takes="number",
        say=("square it", "take its square"),
        ood=("multiply it by itself", "raise it to the power of two"),
        code="{v} * {v}",
        does=lambda v: v**2,
    ),
    "quotient": Step(
        takes="number",
        say=("divide it by {k} without a remainder", "divide by {k}, rounded down"),
        ood=("find how many whole times {k} goes into it", "take the whole part of a {k}-th of it"),
        code="{v} // {k}",
        does=lambda v, k: divmod(v, k)[0],
        values=SIZES,
    ),
    "rest": Step(
        takes="number",
        say=("take the remainder of dividing it by {k}", "take it modulo {k}"),
        ood=("find what is left when {k} divides it", "find the rest after parting it by {k}"),
        code="{v} % {k}",
        does=lambda v, k: divmod(v, k)[1],
        values=SIZES,
    ),
    "digits": Step(
        takes="number",
        say=("compute the sum of its digits", "add its digits up"),
        ood=("total the figures that it is written with", "find what its figures come to"),
        code="sum(int(d) for d in str({v}))",
        does=lambda v: sum(v // 10**at % 10 for at in range(12)),
        last=True,
    ),
    "long": Step(
        takes="number",
        say=("count its digits", "count how many digits it has"),
        ood=("tell how many figures it is written with", "find the number of figures"),
        code="len(str({v}))",
        does=lambda v: max(1, sum(v >= 10**at for at in range(12))),
        last=True,
    ),
    "even": Step(
        takes="number",
        say=("check whether it is even", "check if it is even"),
        ood=("tell whether two divides it", "find out if halves of it are whole"),
        code="{v} % 2 == 0",
        does=lambda v: not v & 1,
        last=True,
    ),
    "above": Step(
        takes="number",
        say=("check whether it is greater than {k}0", "check if it is greater than {k}0"),
        ood=("tell whether it exceeds {k}0", "find out if {k}0 is less than it"),
        code="{v} > {k}0",
        does=lambda v, k: not v <= 10 * k,
        values=SIZES,
        last=True,
    ),
}
STEPS: dict[str, dict[str, Step]] = {"numbers": NUMBERS, "text": TEXT, "number": NUMBER}
