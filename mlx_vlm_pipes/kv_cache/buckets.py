"""The sizes that batch arrays come in, and which rows share arrays.

Rows of a batch lie in a few groups; a group's arrays are as long as its longest row. Fewer groups
are fewer kernels, more groups are less memory: as few are made as keep what is held near what the
rows need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPARE_SHARE = 0.3  # of a row's own tokens that may be held beside them
SPARE_TOKENS = 64  # or so many for each row
SPARE_BATCH = 1024  # and so many for a batch of short rows, which are worth no second group
AIM = 0.75  # new groups leave the rest of what is spare to rows that grow or leave


def capacity_bucket(tokens: int) -> int:
    """Smallest capacity that holds `tokens`: steps of 64 to 512, then of 1/8 to 1/16 of it."""
    step = 64 if tokens <= 512 else 1 << ((tokens - 1).bit_length() - 4)
    return max(64, -(-tokens // step) * step)


def row_bucket(rows: int) -> int:
    """Smallest number of rows that arrays are made for: each to 8, then in steps of 1/4 to 1/8."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def most_held(needs: Sequence[int]) -> int:
    """Tokens that arrays of rows with these needs, in tokens, may hold: what a budget counts.

    It never falls where a row grows or joins.
    """
    if not needs:
        return 0
    return min(row_bucket(len(needs)) * capacity_bucket(max(needs)), int(most_kept(needs)))


def most_kept(needs: Sequence[int]) -> float:
    """Tokens up to which the arrays stay as they are while rows grow and leave."""
    return sum(needs) + _spare(needs)


def _spare(needs: Sequence[int]) -> float:
    """Tokens that may be held beside the rows' own."""
    own = sum(max(SPARE_SHARE * need, SPARE_TOKENS) for need in needs)
    return max(own, SPARE_TOKENS * len(needs) + SPARE_BATCH)


@dataclass(frozen=True)
class Share:
    """The arrays of one group: numbers of its rows, places for rows, tokens of each place."""

    rows: tuple[int, ...]
    slots: int
    capacity: int


def partition(needs: Sequence[int]) -> list[Share]:
    """Rows with these needs, in tokens, in as few groups as `most_held` lets them be.

    Groups go from short rows to long ones; inside, rows keep their order.
    """
    capacities = sorted({capacity_bucket(need) for need in needs})
    rows = [[i for i, n in enumerate(needs) if capacity_bucket(n) == c] for c in capacities]
    own, spare = sum(needs), _spare(needs)
    counts = [len(same) for same in rows]
    for bucket, share in ((row_bucket, AIM), (row_bucket, 1.0), (int, 1.0)):
        cuts = _fewest(counts, capacities, own + share * spare, bucket)
        if cuts is not None:
            break
    else:
        raise AssertionError(f"no groups are small enough for rows of {list(needs)} tokens")
    shares = []
    for begin, end in itertools.pairwise(cuts):
        own_rows = sorted(itertools.chain.from_iterable(rows[begin:end]))
        shares.append(Share(tuple(own_rows), bucket(len(own_rows)), capacities[end - 1]))
    return shares


def _fewest(
    counts: Sequence[int], capacities: Sequence[int], most: float, bucket: Callable[[int], int]
) -> list[int] | None:
    """Where to cut runs of rows of equal capacity so that few groups hold at most `most` tokens.

    counts: rows of each run. Returns the borders, 0 and the number of runs included, or None.
    """
    before = [0, *itertools.accumulate(counts)]
    size = len(counts)

    def held(begin: int, end: int) -> int:
        return bucket(before[end] - before[begin]) * capacities[end - 1]

    # best[end]: least tokens for the first `end` runs in so many groups, and the borders
    best = {end: (held(0, end), [0, end]) for end in range(1, size + 1)}
    for groups in range(1, size + 1):
        if size in best and best[size][0] <= most:
            return best[size][1]
        best = {
            end: min(
                (best[cut][0] + held(cut, end), [*best[cut][1], end])
                for cut in range(groups, end)
                if cut in best
            )
            for end in range(groups + 1, size + 1)
        }
    return None
