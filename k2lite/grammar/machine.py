"""Follows a text through a grammar byte by byte, in every way it can be read, and knows the shortest way to its end.

Invariant: what was advanced over is the beginning of a text of the grammar, and `shortest` completes it to one. A way
is a stack of nodes still to come; stacks share tails and are made once, so what was seen before costs a look-up.
"""

from __future__ import annotations

from .nodes import Alt, Bytes, Lexeme, Literal, Node, Ref, Repeat, Seq


class Cell:
    """A stack: the node to match next, and the stack below it. `bytes_left` is the length of its shortest text."""

    __slots__ = ("below", "bytes_left", "node", "steps")

    def __init__(self, node: Node, below: Cell | None) -> None:
        self.node = node
        self.below = below
        own = len(node.shortest or b"")
        self.bytes_left: int = own + (below.bytes_left if below else 0)
        self.steps: list[tuple[frozenset[int], Cell | None]] | None = None


State = frozenset["Cell | None"]  # None is the empty stack: the text may end here


class Machine:
    """One text through one grammar. States are values: keep one to come back to it."""

    def __init__(self, root: Node) -> None:
        self._cells: dict[tuple[int, int], Cell] = {}
        self._repeats: dict[tuple[int, int, int | None], Node] = {}
        self._tails: dict[bytes, Node] = {}
        self._single: dict[int, frozenset[int]] = {}
        self._next: dict[tuple[State, int], State] = {}
        self.start: State = frozenset([self._cell(root, None)])

    def advance(self, state: State, text: bytes) -> State:
        """The state after `text`; empty where no text of the grammar goes on like this."""
        for byte in text:
            key = (state, byte)
            found = self._next.get(key)
            if found is None:
                found = frozenset(
                    below
                    for cell in state
                    if cell is not None
                    for allowed, below in self._steps(cell)
                    if byte in allowed
                )
                self._next[key] = found
            state = found
            if not state:
                break
        return state

    def accepts(self, state: State) -> bool:
        """Whether the text may end here."""
        return any(self._ends(cell) for cell in state)

    def continues(self, state: State) -> bool:
        """Whether anything may follow."""
        return any(self._steps(cell) for cell in state if cell is not None)

    def shortest(self, state: State) -> bytes:
        """The fewest bytes that complete the text."""
        cell = min(state, key=lambda cell: cell.bytes_left if cell else 0)
        pieces = []
        while cell is not None:
            pieces.append(cell.node.shortest or b"")
            cell = cell.below
        return b"".join(pieces)

    def bytes_left(self, state: State) -> int:
        return min(cell.bytes_left if cell else 0 for cell in state)

    def _cell(self, node: Node, below: Cell | None) -> Cell:
        key = (id(node), id(below))
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = Cell(node, below)
        return cell

    def _ends(self, cell: Cell | None) -> bool:
        return cell is None or cell.bytes_left == 0

    def _steps(self, cell: Cell) -> list[tuple[frozenset[int], Cell | None]]:
        """The bytes that may come next, and the stack after each."""
        if cell.steps is None:
            found: list[tuple[frozenset[int], Cell | None]] = []
            seen: set[int] = set()
            todo: list[Cell] = [cell]
            while todo:
                top = todo.pop()
                if id(top) in seen or top.node.shortest is None:
                    continue
                seen.add(id(top))
                if isinstance(top.node, Bytes):
                    found.append((top.node.allowed, top.below))
                elif isinstance(top.node, Literal) and top.node.text:
                    found.append(self._literal(top.node.text, top.below))
                else:
                    todo.extend(cell for cell in self._expanded(top) if cell is not None)
            cell.steps = found
        return cell.steps

    def _literal(self, text: bytes, below: Cell | None) -> tuple[frozenset[int], Cell | None]:
        first = self._single.setdefault(text[0], frozenset([text[0]]))
        if len(text) == 1:
            return first, below
        tail = self._tails.get(text[1:])
        if tail is None:
            tail = self._tails[text[1:]] = Literal(text[1:])
        return first, self._cell(tail, below)

    def _expanded(self, cell: Cell) -> list[Cell | None]:
        """The stacks that a stack stands for, one node further down."""
        node, below = cell.node, cell.below
        if isinstance(node, Seq):
            for item in reversed(node.items):
                below = self._cell(item, below)
            return [below]
        if isinstance(node, Alt):
            return [self._cell(item, below) for item in node.items]
        if isinstance(node, Lexeme | Ref):
            return [self._cell(node.parts()[0], below)]
        if isinstance(node, Repeat):
            ends = [below] if node.low == 0 else []
            if node.high == 0:
                return [below]
            return [*ends, self._cell(node.item, self._cell(self._repeat(node), below))]
        return [below]  # an empty literal

    def _repeat(self, node: Repeat) -> Node:
        """What is left of a repetition after one more."""
        low, high = max(node.low - 1, 0), None if node.high is None else node.high - 1
        if (low, high) == (node.low, node.high):
            return node
        key = (id(node.item), low, high)
        found = self._repeats.get(key)
        if found is None:
            found = self._repeats[key] = Repeat(node.item, low, high)
        return found
