"""`pattern`: a regular expression as a grammar of the JSON strings that it finds something in.

Takes what Python's own parser of regular expressions reads; what looks around or back, and flags, are refused.
\\d, \\w and \\s mean ASCII.
"""

from __future__ import annotations

import json
from re import _constants as codes, _parser as parser, error as RegexError  # type: ignore[attr-defined]
from typing import Any

from k2lite.quant.errors import RequestError

from .nodes import EMPTY, Alt, Bytes, Lexeme, Literal, Node, Repeat, Seq
from .strings import LONGER_CHARACTERS, PLAIN, QUOTE, character

_CLASSES: dict[Any, frozenset[int]] = {
    codes.CATEGORY_DIGIT: frozenset(b"0123456789"),
    codes.CATEGORY_SPACE: frozenset(b" \t\n\r\f\v"),
    codes.CATEGORY_WORD: frozenset(b"_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
_NEGATED = {
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
}
ASCII = frozenset(range(128))
MAX_TIMES = 10_000
_BEGIN, _END = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING), (codes.AT_END, codes.AT_END_STRING)


def pattern_string(pattern: str, low: int, high: int | None) -> Node:
    """Strings of `low` to `high` characters in which `pattern` is found. Raises RequestError for what is not taken."""
    if len(pattern) > 2000:
        raise RequestError("the pattern is longer than 2000 characters")
    try:
        parsed = list(parser.parse(pattern))
    except (RegexError, RecursionError, OverflowError) as error:
        raise RequestError(f"the pattern is not a regular expression: {error}") from error
    first = bool(parsed) and parsed[0] == (codes.AT, parsed[0][1]) and parsed[0][1] in _BEGIN
    last = bool(parsed) and parsed[-1][0] is codes.AT and parsed[-1][1] in _END
    middle = parsed[first : len(parsed) - last]
    if first and last:
        middle = _clamped(middle, low, high)
    least, most = _width(middle)
    loose = not (first and last)
    if least < low or (high is not None and (least > high or (most is None or most > high))):
        if not loose or (high is not None and (most is None or most > high)):
            raise RequestError("pattern together with minLength or maxLength is not supported in this form")
        padding = Repeat(character(), max(0, low - least), None if high is None else high - (most or 0))
    else:
        padding = Repeat(character(), 0, None if high is None else high - (most or 0))
    parts = [QUOTE, _sequence(middle), *([] if last else [padding]), QUOTE]
    if not first and last:
        parts.insert(1, padding)
    return Lexeme(Seq(*parts))


def _clamped(parsed: list[Any], low: int, high: int | None) -> list[Any]:
    """A pattern that is one repetition of single characters, with its counts within the lengths."""
    if len(parsed) == 1 and parsed[0][0] is codes.MAX_REPEAT:
        least, most, item = parsed[0][1]
        if _width(list(item)) == (1, 1):
            upper = most if high is None else min(high, most)
            return [(codes.MAX_REPEAT, (max(least, low), upper, item))]
    return parsed


def _width(parsed: list[Any]) -> tuple[int, int | None]:
    least, most = 0, 0
    unbounded = False
    for code, value in parsed:
        low, high = _width_of(code, value)
        least += low
        most += high or 0
        unbounded = unbounded or high is None
    return least, None if unbounded else most


def _width_of(code: Any, value: Any) -> tuple[int, int | None]:
    if code in (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY):
        return 1, 1
    if code is codes.SUBPATTERN:
        return _width(list(value[3]))
    if code is codes.BRANCH:
        widths = [_width(list(branch)) for branch in value[1]]
        most = [high for _, high in widths]
        return min(low for low, _ in widths), None if None in most else max(high or 0 for high in most)
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        low, high = _width(list(value[2]))
        return low * value[0], None if high is None or value[1] is codes.MAXREPEAT else high * value[1]
    raise RequestError("the pattern looks around or back, which is not supported in constrained decoding")


def _sequence(parsed: list[Any]) -> Node:
    return Seq(*(_node(code, value) for code, value in parsed))


def _node(code: Any, value: Any) -> Node:
    if code is codes.LITERAL:
        return _literal(value)
    if code is codes.NOT_LITERAL:
        return _one_of(ASCII - {value}, longer=value < 128)
    if code is codes.ANY:
        return _one_of(ASCII - {10}, longer=True)
    if code is codes.IN:
        return _set(value)
    if code is codes.SUBPATTERN:
        if value[1] or value[2]:
            raise RequestError("the pattern sets flags, which is not supported in constrained decoding")
        return _sequence(list(value[3]))
    if code is codes.BRANCH:
        return Alt(*(_sequence(list(branch)) for branch in value[1]))
    low, high, item = value  # a repetition: _width_of has refused everything else
    limit = None if high is codes.MAXREPEAT else int(high)
    if low > MAX_TIMES:
        raise RequestError(f"the pattern repeats more than {MAX_TIMES} times")
    inner = _sequence(list(item))
    if inner.shortest == b"":
        raise RequestError("the pattern repeats something that may be empty, which is not supported")
    return Repeat(inner, low, limit)


def _literal(code: int) -> Node:
    text = json.dumps(chr(code), ensure_ascii=False)[1:-1]
    if 0xD800 <= code < 0xE000 or code == 0x7F:
        raise RequestError("the pattern holds a character that can't be written")
    return Literal(text.encode())


def _set(items: list[Any]) -> Node:
    ascii_part: set[int] = set()
    others: list[int] = []
    negated = False
    longer = False
    for code, value in items:
        if code is codes.NEGATE:
            negated = True
        elif code is codes.LITERAL:
            (ascii_part.add if value < 128 else others.append)(value)
        elif code is codes.RANGE:
            low, high = value
            ascii_part.update(range(low, min(high, 127) + 1))
            if high > 127:
                beyond = range(max(low, 128), high + 1)
                if len(beyond) > 1000:  # narrower than the range, never wider
                    beyond = beyond[:1000]
                others += [code for code in beyond if not 0xD800 <= code < 0xE000]
        elif value in _CLASSES:
            ascii_part |= _CLASSES[value]
        elif value in _NEGATED:
            ascii_part |= ASCII - _CLASSES[_NEGATED[value]]
            longer = True
    if negated:
        return _one_of(ASCII - ascii_part, longer=not others and not longer)
    return Alt(_one_of(frozenset(ascii_part), longer=longer), *(_literal(code) for code in others))


def _one_of(allowed: frozenset[int], *, longer: bool) -> Node:
    """One character of these ASCII ones, or any beyond ASCII too."""
    options: list[Node] = []
    plain = allowed & PLAIN
    if plain and longer:
        options.append(character(PLAIN - plain))
    elif plain:
        options.append(Bytes(plain, "[" + "".join(f"\\x{byte:02X}" for byte in sorted(plain)) + "]"))
    elif longer:
        options.append(Alt(*LONGER_CHARACTERS, regex=r"[^\x00-\x7F]"))
    options += [_literal(byte) for byte in sorted(allowed - PLAIN - {0x7F})]
    return Alt(*options) if options else Repeat(EMPTY, 1, 0)
