"""Grammars over bytes: a few node kinds, the shortest text of each, and the same grammar in llguidance's language.

Invariant: `shortest` is a text of the node, and none is shorter (None: the node has no text at all). Knows no JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence


class Node:
    """Something that texts match. `regex` is its pattern, None where it takes a rule (recursion is inside)."""

    __slots__ = ("regex", "shortest")

    def __init__(self, shortest: bytes | None, regex: str | None) -> None:
        self.shortest = shortest
        self.regex = regex

    def parts(self) -> Sequence[Node]:
        return ()


class Bytes(Node):
    """One byte of a set; `regex` is that of the characters, if it stands for whole ones."""

    __slots__ = ("allowed",)

    def __init__(self, allowed: frozenset[int], regex: str | None = None) -> None:
        super().__init__(bytes([min(allowed)]), regex)
        self.allowed = allowed


class Literal(Node):
    """Exactly this text."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        super().__init__(text, None)
        self.text = text
        try:
            self.regex = escape(text.decode())
        except UnicodeDecodeError:
            self.regex = None  # the rest of a character; such nodes come up in matching only


class Seq(Node):
    """One after the other."""

    __slots__ = ("items",)

    def __init__(self, *items: Node, regex: str | None = None) -> None:
        super().__init__(None, regex or _joined([item.regex for item in items], ""))
        self.items = items
        self.shortest = _sum(items)

    def parts(self) -> Sequence[Node]:
        return self.items


class Alt(Node):
    """One of these."""

    __slots__ = ("items",)

    def __init__(self, *items: Node, regex: str | None = None) -> None:
        super().__init__(None, regex or _joined([item.regex for item in items], "|"))
        self.items = items
        self.shortest = _least(items)

    def parts(self) -> Sequence[Node]:
        return self.items


class Repeat(Node):
    """`low` to `high` times the same (no end if None). The item has no empty text."""

    __slots__ = ("high", "item", "low")

    def __init__(self, item: Node, low: int, high: int | None) -> None:
        times = f"{{{low},{'' if high is None else high}}}"
        super().__init__(None, None if item.regex is None else f"(?:{item.regex}){times}")
        self.item, self.low, self.high = item, low, high
        self.shortest = _times(item, low)

    def parts(self) -> Sequence[Node]:
        return (self.item,)


class Lexeme(Node):
    """A part that llguidance takes as one pattern: a string, a number, punctuation. Never empty, never recursive."""

    __slots__ = ("item",)

    def __init__(self, item: Node) -> None:
        if item.regex is None or item.shortest == b"":
            raise ValueError("a lexeme must be a pattern and never empty")
        super().__init__(item.shortest, item.regex)
        self.item = item

    def parts(self) -> Sequence[Node]:
        return (self.item,)


class Ref(Node):
    """A node that is defined later, so that a grammar can contain itself."""

    __slots__ = ("target",)

    def __init__(self) -> None:
        super().__init__(None, None)
        self.target: Node | None = None

    def parts(self) -> Sequence[Node]:
        return () if self.target is None else (self.target,)


def settle(root: Node) -> None:
    """Find `shortest` of everything below `root` once all Refs have targets. Ends because lengths only fall, and a
    text that contains itself is never the shortest."""
    nodes = list(walk(root))
    changed = True
    while changed:
        changed = False
        for node in reversed(nodes):
            found = _recomputed(node)
            if found is not None and (node.shortest is None or len(found) < len(node.shortest)):
                node.shortest = found
                changed = True


def walk(root: Node) -> Iterator[Node]:
    """Every node once, parents before their parts where there is no circle."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack.extend(node.parts())


def _recomputed(node: Node) -> bytes | None:
    if isinstance(node, Seq):
        return _sum(node.items)
    if isinstance(node, Alt):
        return _least(node.items)
    if isinstance(node, Repeat):
        return _times(node.item, node.low)
    if isinstance(node, Ref | Lexeme):
        return node.parts()[0].shortest
    return node.shortest


def _sum(items: Sequence[Node]) -> bytes | None:
    texts = [item.shortest for item in items]
    return None if None in texts else b"".join(text for text in texts if text is not None)


def _least(items: Sequence[Node]) -> bytes | None:
    return min((item.shortest for item in items if item.shortest is not None), key=len, default=None)


def _times(item: Node, low: int) -> bytes | None:
    if low == 0:
        return b""
    return None if item.shortest is None else item.shortest * low


def _joined(patterns: Sequence[str | None], separator: str) -> str | None:
    found = [pattern for pattern in patterns if pattern is not None]
    return None if len(found) < len(patterns) else "(?:" + separator.join(found) + ")"


def escape(text: str) -> str:
    """`text` as a pattern of llguidance's."""
    return re.sub(r"[^\w ]", lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return f"\\x{{{ord(character):X}}}"


def to_lark(root: Node) -> str:
    """The grammar in llguidance's variant of Lark. Every Lexeme is a pattern; what contains one is a rule."""
    names: dict[int, str] = {}
    rules: list[str] = []
    stack: list[tuple[Node, str]] = []

    def name(node: Node) -> str:
        if isinstance(node, Lexeme):
            return f"/{node.regex}/"
        if id(node) not in names:
            names[id(node)] = f"r{len(names)}"
            stack.append((node, names[id(node)]))
        return names[id(node)]

    rules.append(f"start: {name(root)}")
    while stack:
        node, rule = stack.pop()
        rules.append(f"{rule}: {_rule(node, name)}")
    return "\n".join(rules) + "\n"


def _rule(node: Node, name) -> str:  # type: ignore[no-untyped-def]
    if isinstance(node, Seq):
        return " ".join(name(item) for item in node.items) or '""'
    if isinstance(node, Alt):
        possible = [item for item in node.items if item.shortest is not None]
        return " | ".join(name(item) for item in possible)
    if isinstance(node, Repeat):
        if node.high == 0:
            return '""'
        return f"{name(node.item)}{{{node.low},{'' if node.high is None else node.high}}}"
    if isinstance(node, Ref) and node.target is not None:
        return str(name(node.target))
    raise ValueError(f"a {type(node).__name__} outside a lexeme")


EMPTY = Seq()
