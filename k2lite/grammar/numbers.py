"""JSON numbers between bounds, as patterns of digits.

Invariant: every text is a number within the bounds, and every integer within them has a text. Fractions are taken
between whole numbers that both lie within the bounds; where there is none, the middle of the bounds is the one text.
"""

from __future__ import annotations

import math
from decimal import Decimal

from .nodes import Alt, Bytes, Lexeme, Literal, Node, Repeat, Seq

FREE_DIGITS = 15  # what a double holds
FRACTION_DIGITS = 12


def _class(low: str, high: str) -> Bytes:
    return Bytes(frozenset(range(ord(low), ord(high) + 1)), f"[{low}-{high}]")


DIGIT, NONZERO = _class("0", "9"), _class("1", "9")
_FRACTION = Seq(Literal(b"."), Repeat(DIGIT, 0, FRACTION_DIGITS), NONZERO)  # never nothing, so bounds stay exclusive
_EXPONENT = Seq(Bytes(frozenset(b"eE"), "[eE]"), Repeat(Bytes(frozenset(b"+-"), "[+\\-]"), 0, 1), Repeat(DIGIT, 1, 2))


def integers(low: int | None, high: int | None) -> Node | None:
    """All integers from low to high; None if there are none. Without a bound, up to 15 digits more than the other."""
    signs: list[Node] = []
    positive = _natural(max(low or 0, 0), high)
    if positive is not None:
        signs.append(positive)
    negative = _natural(max(-(high if high is not None else -1), 1), None if low is None else -low)
    if negative is not None and (low is None or low < 0):
        signs.append(Seq(Literal(b"-"), negative))
    return Lexeme(Alt(*signs)) if signs else None


def numbers(low: Decimal | None, high: Decimal | None, *, open_low: bool, open_high: bool) -> Node | None:
    """Numbers from low to high; None if none was found."""
    if low is None and high is None:
        whole = _natural(0, None)
        sign = Repeat(Literal(b"-"), 0, 1)
        assert whole is not None
        return Lexeme(Seq(sign, whole, Repeat(Alt(_FRACTION, Literal(b".0")), 0, 1), Repeat(_EXPONENT, 0, 1)))
    first = None if low is None else math.floor(low) + 1 if open_low else math.ceil(low)
    last = None if high is None else math.ceil(high) - 1 if open_high else math.floor(high)
    options: list[Node] = []
    whole = integers(first, last)
    if whole is not None:
        options += [whole, Lexeme(Seq(whole, Literal(b".0")))]
    # n.f lies between n and n + 1, -n.f between -(n + 1) and -n
    above = _natural(max(0, math.ceil(low)) if low is not None else 0, None if high is None else math.floor(high) - 1)
    if above is not None:
        options.append(Lexeme(Seq(above, _FRACTION)))
    below = _natural(max(0, math.ceil(-high)) if high is not None else 0, None if low is None else math.floor(-low) - 1)
    if below is not None:
        options.append(Lexeme(Seq(Literal(b"-"), below, _FRACTION)))
    if not options and low is not None and high is not None:
        middle = (low + high) / 2
        if low < middle < high or (middle == low and not (open_low or open_high)):
            options.append(Lexeme(Literal(f"{middle:f}".encode())))
    return Alt(*options) if options else None


def _natural(low: int, high: int | None) -> Node | None:
    """Numbers from low (0 or more) to high without a sign."""
    digits = len(str(low))
    if high is None:
        longest = max(FREE_DIGITS, digits + 1)
        upper: list[Node] = [Seq(NONZERO, Repeat(DIGIT, digits, longest - 1))]
        exact = _between(str(low), "9" * digits)
        return Alt(exact, *upper)
    if high < low:
        return None
    options = []
    for length in range(digits, len(str(high)) + 1):
        least = max(low, 10 ** (length - 1) if length > 1 else 0)
        most = min(high, 10**length - 1)
        options.append(_between(str(least), str(most)))
    return Alt(*options)


def _between(low: str, high: str) -> Node:
    """Texts of digits of one length from low to high."""
    if not low:
        return Seq(regex="")
    if low == "0" * len(low) and high == "9" * len(high):
        return Repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return Seq(Literal(low[0].encode()), _between(low[1:], high[1:]))
    rest = len(low) - 1
    options: list[Node] = [Seq(Literal(low[0].encode()), _between(low[1:], "9" * rest))]
    if int(high[0]) - int(low[0]) > 1:
        middle = _class(str(int(low[0]) + 1), str(int(high[0]) - 1))
        options.append(Seq(middle, Repeat(DIGIT, rest, rest)))
    options.append(Seq(Literal(high[0].encode()), _between("0" * rest, high[1:])))
    return Alt(*options)
