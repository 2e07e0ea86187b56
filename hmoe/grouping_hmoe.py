"""Which experts are multiplied together, and what is gathered, activated and added up at once.

Pure bookkeeping for `grouped_hmoe.py` on numbers of rows and sizes. The (token, slot) pairs, sorted by expert, become
rows: an expert of its own has as many as pairs; experts multiplied together in one batch have equally many, the
missing ones of zeros. This file travels with every saved checkpoint, so it imports only torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


# Limits in neurons of all rows, of which there are gate, up and product: of a segment of several experts; and of one
# of one expert, larger, since each part of an expert reads its weights and adds to their gradients anew.
_SEGMENT, _LONGEST_PART = 1 << 17, 1 << 21
_ACCELERATOR_FACTOR = 1 << 8  # there is no cache to stay in there, but launches to save
# A product takes at least the time of reading its matrix, as long as that of so many more rows; and a call as long as
# so many rows of a neuron would at hidden size 1. Measured on CPUs; nothing is multiplied together on accelerators.
_READING_ROWS, _CALL = 8, 1 << 20


class Group(NamedTuple):
    """One expert, or several consecutive ones of one size that are multiplied together, each with `num_rows` rows."""

    first: int
    num_experts: int
    num_rows: int
    size: int

    @property
    def experts(self) -> slice:
        return slice(self.first, self.first + self.num_experts)

    @property
    def total_rows(self) -> int:
        return self.num_experts * self.num_rows

    @property
    def num_neurons(self) -> int:
        """Of all rows."""
        return self.num_experts * self.num_rows * self.size

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of a matrix [height, width] per expert."""
        return (height, width) if self.num_experts == 1 else (self.num_experts, height, width)


class Segment(NamedTuple):
    """Groups whose rows are gathered, activated and added to the output together."""

    groups: list[Group]
    first_group: int
    rows: slice
    pairs: slice
    continues: bool  # its expert, then the only one, had rows in the segment before

    @property
    def in_plan(self) -> slice:
        """Where its groups are among all."""
        return slice(self.first_group, self.first_group + len(self.groups))

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_neurons(self) -> int:
        return sum(group.num_neurons for group in self.groups)

    @property
    def has_made_up_rows(self) -> bool:
        return self.num_rows > self.pairs.stop - self.pairs.start


class Plan(NamedTuple):
    groups: list[Group]
    segments: list[Segment]
    num_rows: int
    num_neurons: int  # of all rows
    row_of_pair: Tensor | None  # [pairs], int64 on the CPU; None where they are the same


def make_plan(
    rows_per_expert: list[int], sizes: list[int], hidden_size: int, device: torch.device, max_neurons: int | None
) -> Plan:
    """The plan for experts with so many pairs, whose neurons of all rows are at most `max_neurons`.

    Rows of zeros count too, and are left out if they do not fit; `max_neurons` must hold those of the pairs.
    """
    groups = _groups(rows_per_expert, sizes, hidden_size, _SEGMENT if device.type == "cpu" else 0)
    if max_neurons is not None and sum(group.num_neurons for group in groups) > max_neurons:
        groups = _groups(rows_per_expert, sizes, hidden_size, 0)
    row_of_pair = None
    if any(group.num_experts > 1 for group in groups):
        row_of_pair = _rows_of_pairs(groups, rows_per_expert)
    return Plan(
        groups,
        _segments(groups, rows_per_expert, device),
        sum(group.total_rows for group in groups),
        sum(group.num_neurons for group in groups),
        row_of_pair,
    )


def _groups(rows_per_expert: list[int], sizes: list[int], hidden_size: int, max_neurons: int) -> list[Group]:
    """Consecutive experts of one size together where that costs less, each group up to `max_neurons` of all rows.

    An expert without rows among others may be multiplied with them, as zeros.
    """
    groups: list[Group] = []
    call, cost, is_open = _CALL / hidden_size, 0.0, False
    first = num_experts = num_rows = group_size = 0
    for expert, (rows, size) in enumerate(zip(rows_per_expert, sizes)):
        if rows == 0 or size == 0:
            is_open = is_open and size == group_size
            continue
        cost_alone = call + (rows + _READING_ROWS) * size
        if is_open and size == group_size:
            number, most = expert + 1 - first, max(rows, num_rows)
            cost_together = call + number * (most + _READING_ROWS) * size
            if cost_together <= cost + cost_alone and number * most * size <= max_neurons:
                num_experts, num_rows, cost = number, most, cost_together
                continue
        if num_experts:
            groups.append(Group(first, num_experts, num_rows, group_size))
        first, num_experts, num_rows, group_size, cost, is_open = expert, 1, rows, size, cost_alone, True
    if num_experts:
        groups.append(Group(first, num_experts, num_rows, group_size))
    return groups


def _rows_of_pairs(groups: list[Group], rows_per_expert: list[int]) -> Tensor:
    counts, offsets = [], []  # of each expert: its pairs, and how far ahead of them its rows are
    row = pair = 0
    for group in groups:
        for count in rows_per_expert[group.experts]:
            counts.append(count)
            offsets.append(row - pair)
            row, pair = row + group.num_rows, pair + count
    return torch.arange(pair) + torch.tensor(offsets).repeat_interleave(torch.tensor(counts), output_size=pair)


def _segments(groups: list[Group], rows_per_expert: list[int], device: torch.device) -> list[Segment]:
    """Several groups up to a limit; one that exceeds it alone; one expert that exceeds another limit in parts."""
    factor = 1 if device.type == "cpu" else _ACCELERATOR_FACTOR
    segments: list[Segment] = []
    room = row = pair = 0
    for number, group in enumerate(groups):
        end_row, end_pair = row + group.total_rows, pair + sum(rows_per_expert[group.experts])
        num_parts = 1
        if group.num_experts == 1:
            num_parts = min(-(-group.num_neurons // (_LONGEST_PART * factor)), group.num_rows)
        if group.num_neurons <= room:
            last = segments[-1]
            last.groups.append(group)
            rows, pairs = slice(last.rows.start, end_row), slice(last.pairs.start, end_pair)
            segments[-1] = last._replace(rows=rows, pairs=pairs)
            room -= group.num_neurons
        elif num_parts == 1:
            segments.append(Segment([group], number, slice(row, end_row), slice(pair, end_pair), continues=False))
            room = _SEGMENT * factor - group.num_neurons
        else:
            bounds = [group.num_rows * part // num_parts for part in range(num_parts + 1)]
            for start, end in zip(bounds, bounds[1:]):
                part_of_group = group._replace(num_rows=end - start)
                rows, pairs = slice(row + start, row + end), slice(pair + start, pair + end)
                segments.append(Segment([part_of_group], number, rows, pairs, continues=start > 0))
            room = 0
        row, pair = end_row, end_pair
    return segments
