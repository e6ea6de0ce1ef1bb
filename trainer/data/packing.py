"""Packing of whole conversations into rows of at most so many tokens."""

from bisect import bisect_left, insort

import numpy as np


def pack_lengths(lengths_N: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the indices of the items of each row, whose lengths add up to at most `capacity`.

    Best-fit decreasing (Johnson 1973): the longest first, each into the fullest row that has room
    for it. No item is split or left out. The result depends on the lengths alone.
    """
    assert len(lengths_N) == 0 or lengths_N.max() <= capacity, (lengths_N.max(), capacity)
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left → rows
    rooms: list[int] = []  # those with rows, ascending
    for item in np.argsort(-lengths_N, kind="stable").tolist():
        length = int(lengths_N[item])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
            rows[row].append(item)
        else:
            room, row = capacity, len(rows)
            rows.append([item])
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(row)
    return rows
