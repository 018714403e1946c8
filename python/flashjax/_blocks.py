"""Which queries of one device meet which keys of another, as ordinary attention calls on parts of both.

All of it is known when the program is compiled: windows become rectangles with a diagonal, rectangles without live
scores are dropped, rows and columns without any are cut off, and what is left unmasked is merged.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from flashjax._layouts import Piece


class Block(NamedTuple):
    """One call: queries rows[0]:rows[1] and keys cols[0]:cols[1] of two devices, with a window of its own.

    Query i of the rows sits on key i + shift of the columns. Where there is no window, shift means nothing.
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    left: int
    right: int
    shift: int

    @property
    def work(self) -> int:
        """How many scores are not masked."""
        keys = self.cols[1] - self.cols[0]
        total = 0
        for i in range(self.rows[1] - self.rows[0]):
            first = 0 if self.left < 0 else max(0, i + self.shift - self.left)
            last = keys - 1 if self.right < 0 else min(keys - 1, i + self.shift + self.right)
            total += max(0, last - first + 1)
        return total


class Mask(NamedTuple):
    """What a score's position decides. left, right: the window, -1 for no bound; causal is right = 0."""

    left: int
    right: int
    offset: int  # query i of the whole sequence sits on key i + offset
    is_positional: bool  # distances matter even where nothing is masked (alibi)


def blocks(queries: Sequence[Piece], keys: Sequence[Piece], mask: Mask) -> tuple[Block, ...]:
    """The calls that make up the attention of one device's queries to another's (or its own) keys."""
    is_order = mask.left < 0 and mask.right == 0 and mask.offset == 0 and not mask.is_positional
    if is_order and queries == keys and all(p.start + p.length <= q.start for p, q in itertools.pairwise(keys)):
        end = keys[-1].offset + keys[-1].length  # rows and keys are in order here, and causality asks no more
        return (Block((0, end), (0, end), -1, 0, 0),)
    found = [block for q in queries for k in keys if (block := _block(q, k, mask)) is not None]
    return tuple(_merged(found) if not mask.is_positional else found)


def _block(q: Piece, k: Piece, mask: Mask) -> Block | None:
    """Row i and column j of a pair of pieces may meet if low <= j - i <= high."""
    assert q.stride == k.stride
    ahead = k.start - q.start - mask.offset
    low = None if mask.left < 0 else math.ceil((-mask.left - ahead) / q.stride)
    high = None if mask.right < 0 else math.floor((mask.right - ahead) / q.stride)
    row, rows = max(0, 0 if high is None else -high), min(q.length, q.length if low is None else k.length - low)
    col, cols = max(0, 0 if low is None else low), min(k.length, k.length if high is None else q.length + high)
    if row >= rows or col >= cols or (low is not None and high is not None and low > high):
        return None

    low = None if low is None or low - col + row <= row + 1 - rows else low - col + row
    high = None if high is None or high - col + row >= cols - col - 1 else high - col + row
    if mask.is_positional:
        assert q.stride == 1
        shift = row - col - ahead
    else:
        shift = high if high is not None else low if low is not None else 0
    return Block(
        (q.offset + row, q.offset + rows),
        (k.offset + col, k.offset + cols),
        -1 if low is None else shift - low,
        -1 if high is None else high - shift,
        shift,
    )


def _merged(found: list[Block]) -> list[Block]:
    """Unmasked blocks that lie side by side become one, along the queries and then along the keys."""
    for by in ("rows", "cols"):
        other = "cols" if by == "rows" else "rows"
        merged: list[Block] = []
        for block in sorted(found, key=lambda x: (getattr(x, other), getattr(x, by))):
            last = merged[-1] if merged else None
            if (
                last is not None
                and all(x.left < 0 and x.right < 0 for x in (last, block))
                and getattr(last, other) == getattr(block, other)
                and getattr(last, by)[1] == getattr(block, by)[0]
            ):
                merged[-1] = last._replace(**{by: (getattr(last, by)[0], getattr(block, by)[1])})
            else:
                merged.append(block)
        found = merged
    return found
