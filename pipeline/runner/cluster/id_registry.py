"""Ids over all parts of an input: what each part must know of those before it, so that every id stands once. Pure.

Parts are planned apart from each other, in any order; their claims are settled in the order of the input. Where a part
takes an id that one before it has, it is planned again, knowing of these: so equal lines are counted, and a
`custom_id` that stands twice is refused, as if one machine had read it all.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.core.hashing import FingerprintSet
from pipeline.core.types import IdRange

NONE = IdRange(marks=(), repeats={}, is_alone=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a part holds: how many lines its last span has, and of all lines that are not blank the keys (`record.key`).

    `claims` is what planning them left behind, `before` what was known then of the parts before.
    """

    lines: int
    keys: Sequence[int]
    claims: IdRange
    before: IdRange = field(default=NONE)


class IdRegistry:
    """All that was claimed so far: 10 bytes a line."""

    def __init__(self) -> None:
        self._ids = FingerprintSet()
        self._repeats: dict[int, int] = {}

    def settle(self, scan: Scan) -> IdRange | None:
        """Take what the next part claims; where it did not know enough, return what it must know and take nothing."""
        taken = array("Q", (mark for mark in scan.claims.marks if mark in self._ids))
        if taken:
            marks = array("Q", (*scan.before.marks, *taken))
            repeats = {mark: self._repeats[mark] for mark in marks if mark in self._repeats}
            return IdRange(marks=marks, repeats=repeats, is_alone=True)
        self._ids.add_all(scan.claims.marks)
        self._repeats.update(scan.claims.repeats)
        return None
