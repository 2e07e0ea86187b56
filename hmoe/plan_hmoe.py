"""Which experts are multiplied together, and what is gathered, activated and added up at once.

Pure bookkeeping for `grouped_hmoe.py` on numbers of rows and sizes. The (token, slot) pairs, sorted by expert, become
rows: an expert of its own has as many as pairs; experts multiplied together in one batch have equally many, the
missing ones of zeros. This file travels with every saved checkpoint, so it imports only torch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


# Limits in neurons of all rows, of which there are gate, up and product: of a segment of several experts; and of one
# of one expert, larger, since each part of an expert reads its weights and adds to their gradients anew.
_SEGMENT, _LONGEST_PART = 1 << 17, 1 << 21
_ACCELERATOR_FACTOR = 1 << 8  # there is no cache to stay in there, but launches to save
# Costs in rows of a neuron. Reading the matrix of a product: those of so many rows. A product on its own, at hidden
# size 1: more in half precision, where it is prepared every time, and in training, where one product for several
# experts also writes their gradients in parallel. Making up rows: for every pair, which is copied once more where any
# is made up. Measured on CPUs; nothing is multiplied together on accelerators.
_READING, _CALL, _DEAR_CALL, _COPYING = 4, 1 << 18, 1 << 20, 20


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
    rows_per_expert: list[int],
    sizes: list[int],
    hidden_states: Tensor,
    *,
    training: bool,
    max_neurons: int | None = None,
) -> Plan:
    """The plan for experts with so many pairs, whose neurons of all rows are at most `max_neurons`.

    Rows of zeros count too, and are left out if they do not fit; `max_neurons` must hold those of the pairs.
    """
    groups = [Group(i, 1, rows, size) for i, (rows, size) in enumerate(zip(rows_per_expert, sizes)) if rows * size]
    if hidden_states.device.type == "cpu":
        is_dear = training or hidden_states.dtype.itemsize < 4
        call = (_DEAR_CALL if is_dear else _CALL) / hidden_states.shape[1]
        together, saving = _multiplied_together(groups, sizes, call)
        num_pairs = sum(group.num_rows for group in groups)
        if sum(group.total_rows for group in together) > num_pairs:
            saving -= _COPYING * num_pairs
        fits = max_neurons is None or sum(group.num_neurons for group in together) <= max_neurons
        if saving > 0 and fits:
            groups = together
    row_of_pair = None
    if any(group.num_experts > 1 for group in groups):
        row_of_pair = _rows_of_pairs(groups, rows_per_expert)
    return Plan(
        groups,
        _segments(groups, rows_per_expert, hidden_states.device),
        sum(group.total_rows for group in groups),
        sum(group.num_neurons for group in groups),
        row_of_pair,
    )


def _multiplied_together(experts: list[Group], sizes: list[int], call: float) -> tuple[list[Group], float]:
    """Consecutive experts of one size together where that costs less, and how much less in all.

    An expert without rows among others may be multiplied with them, as zeros. `call` is what a product costs beside
    its rows and matrix.
    """
    groups: list[Group] = []
    total_saving = cost = 0.0
    for first, _, rows, size in experts:
        cost_alone = call + (rows + _READING) * size
        if groups and groups[-1].size == size:
            last = groups[-1]
            number, most = first + 1 - last.first, max(rows, last.num_rows)
            saving = cost + cost_alone - call - number * (most + _READING) * size
            are_a_run = number == last.num_experts + 1 or set(sizes[last.first : first]) == {size}
            if saving >= 0 and number * most * size <= _SEGMENT and are_a_run:
                groups[-1] = Group(last.first, number, most, size)
                cost += cost_alone - saving
                total_saving += saving
                continue
        groups.append(Group(first, 1, rows, size))
        cost = cost_alone
    return groups, total_saving


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
    neurons = [group.num_neurons for group in groups]
    row_bounds = [0, *accumulate(group.total_rows for group in groups)]
    pair_bounds = [0, *accumulate(sum(rows_per_expert[group.experts]) for group in groups)]
    segments: list[Segment] = []
    start = 0
    while start < len(groups):
        group, end = groups[start], start + 1
        num_parts = min(-(-neurons[start] // (_LONGEST_PART * factor)), group.num_rows)
        if num_parts > 1 and group.num_experts == 1:
            bounds = [group.num_rows * part // num_parts for part in range(num_parts + 1)]
            for first, last in zip(bounds, bounds[1:]):
                rows = slice(row_bounds[start] + first, row_bounds[start] + last)
                pairs = slice(pair_bounds[start] + first, pair_bounds[start] + last)
                part_of_group = group._replace(num_rows=last - first)
                segments.append(Segment([part_of_group], start, rows, pairs, continues=first > 0))
        else:
            room = _SEGMENT * factor - neurons[start]
            while end < len(groups) and neurons[end] <= room:
                room -= neurons[end]
                end += 1
            rows, pairs = slice(row_bounds[start], row_bounds[end]), slice(pair_bounds[start], pair_bounds[end])
            segments.append(Segment(groups[start:end], start, rows, pairs, continues=False))
        start = end
    return segments
