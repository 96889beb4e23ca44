"""JSON strings as byte grammars: whole UTF-8 characters and the short escapes, so that any text of it is valid."""

from __future__ import annotations

from collections.abc import Collection

from .nodes import Alt, Bytes, Lexeme, Literal, Node, Repeat, Seq


def _range(low: int, high: int) -> Bytes:
    return Bytes(frozenset(range(low, high + 1)))


_TAIL = _range(0x80, 0xBF)
LONGER_CHARACTERS = (
    Seq(_range(0xC2, 0xDF), _TAIL),
    Seq(_range(0xE0, 0xE0), _range(0xA0, 0xBF), _TAIL),
    Seq(_range(0xE1, 0xEC), _TAIL, _TAIL),
    Seq(_range(0xED, 0xED), _range(0x80, 0x9F), _TAIL),  # not the surrogates
    Seq(_range(0xEE, 0xEF), _TAIL, _TAIL),
    Seq(_range(0xF0, 0xF0), _range(0x90, 0xBF), _TAIL, _TAIL),
    Seq(_range(0xF1, 0xF3), _TAIL, _TAIL, _TAIL),
    Seq(_range(0xF4, 0xF4), _range(0x80, 0x8F), _TAIL, _TAIL),
)
_HEX = Bytes(frozenset(b"0123456789abcdefABCDEF"), "[0-9a-fA-F]")
_ESCAPE = Seq(
    Literal(b"\\"),
    Alt(Bytes(frozenset(b'"\\/bfnrt'), r'["\\\/bfnrt]'), Seq(Literal(b"u00"), Bytes(frozenset(b"01"), "[01]"), _HEX)),
)
PLAIN = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\')
QUOTE = Literal(b'"')


def character(without: frozenset[int] = frozenset(), *, longer: bool = True) -> Node:
    """One character that is written as itself; ASCII ones in `without` are left out."""
    left_out = "".join(f"\\x{byte:02X}" for byte in sorted(without))
    regex = rf'[^"\\\x00-\x1F\x7F{left_out}]' if longer else None
    return Alt(Bytes(PLAIN - without), *LONGER_CHARACTERS, regex=regex)


_CHARACTER = character()
_ANY = Alt(_CHARACTER, _ESCAPE)


def string(low: int, high: int | None) -> Node:
    """Strings of `low` to `high` characters."""
    return Lexeme(Seq(QUOTE, Repeat(_ANY, low, high), QUOTE))


def key_except(names: Collection[str]) -> Node:
    """Keys of an object that are none of `names`, without escapes (which could spell one of them)."""
    if not names:
        return Lexeme(Seq(QUOTE, Repeat(_CHARACTER, 0, None), QUOTE))
    return Lexeme(Seq(QUOTE, _other_than(frozenset(names))))


def _other_than(names: frozenset[str]) -> Node:
    """The rest of a key, its end quote included, that is none of these rests. After a character beyond ASCII in a
    declared name nothing is taken, which is narrower than need be and always right."""
    rests: dict[str, set[str]] = {}
    for name in names:
        if name:
            rests.setdefault(name[0], set()).add(name[1:])
    ascii_firsts = frozenset(ord(first) for first in rests if first.isascii())
    anything = Seq(Repeat(_CHARACTER, 0, None), QUOTE)
    if any(not first.isascii() for first in rests):
        other: Node = Bytes(PLAIN - ascii_firsts, _ascii_class(PLAIN - ascii_firsts))
    else:
        other = character(ascii_firsts)
    options: list[Node] = [Seq(other, anything)]
    for first, more in sorted(rests.items()):
        if ord(first) in PLAIN:
            options.append(Seq(Literal(first.encode()), _other_than(frozenset(more))))
    if "" not in names:
        options.append(QUOTE)
    return Alt(*options)


def _ascii_class(allowed: frozenset[int]) -> str:
    return "[" + "".join(f"\\x{byte:02X}" for byte in sorted(allowed)) + "]"
