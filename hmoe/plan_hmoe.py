"""Decides which experts share one batched matrix product, and cuts the work into segments.

`grouped_hmoe.py` sorts the (token, slot) pairs by expert and multiplies the rows of each expert with its matrices.

- A group is one expert, or several consecutive experts of one size that share a batched product (`torch.bmm`). In a
  batch all experts need equally many rows, so those with fewer tokens get padding rows of zeros.
- A segment is what is gathered, activated and added to the output at a time: several small groups, one large group,
  or a part of the rows of one very large expert.

Only numbers of rows, sizes and the constants below decide. This file travels with every saved checkpoint, so it
imports only torch.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


# Measured on CPUs of two cores; docs/decisions.md has figures ("Small operations are done for a segment of pairs" and
# "Experts of one size share a batched product"). Limits, in neurons of all rows:
_SEGMENT_NEURONS = 1 << 17  # of several groups: gate, up and their product then take 1.5 MB in fp32
_PART_NEURONS = 1 << 21  # of a part of one expert: each part reads the weights and adds to their gradients again
_ACCELERATOR_FACTOR = 1 << 8  # times both limits there (not measured): launches count, and no cache has to be kept
# Costs, in the time it takes to multiply one row with the weights of one neuron:
_READ_ROWS = 4  # reading these weights from memory
_CALL = 1 << 18  # one product more, at hidden size 1, in fp32 inference
_SLOW_CALL = 1 << 20  # the same in half precision, repacked at every call, and in training, which writes gradients too
_COPY_NEURONS = 20  # copying a pair once more, which padding requires of all pairs


class Group(NamedTuple):
    """One expert, or several consecutive ones of one size in a batch, each with `num_rows` rows."""

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
        """Shape of one matrix [height, width] per expert."""
        return (height, width) if self.num_experts == 1 else (self.num_experts, height, width)


class Segment(NamedTuple):
    """Groups whose rows are gathered, activated and added to the output together."""

    groups: list[Group]
    in_plan: slice  # of the plan's groups; a part of an expert has the expert's group there
    rows: slice
    pairs: slice
    continues: bool  # an earlier segment had other rows of the same, only expert

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_neurons(self) -> int:
        return sum(group.num_neurons for group in self.groups)

    @property
    def has_padding(self) -> bool:
        return self.num_rows > self.pairs.stop - self.pairs.start


class Plan(NamedTuple):
    groups: list[Group]
    segments: list[Segment]
    num_rows: int
    num_neurons: int  # of all rows
    row_of_pair: Tensor | None  # [pairs], int64 on the CPU; None without batches: row and pair are then the same


def make_plan(
    rows_per_expert: list[int],
    sizes: list[int],
    hidden_states: Tensor,
    *,
    training: bool,
    max_neurons: int | None = None,
) -> Plan:
    """The plan for one call.

    Args:
        rows_per_expert: sorted pairs of each expert [E].
        sizes: neurons of each expert [E].
        hidden_states: [T, H]; its device, dtype and H decide what a product costs.
        training: whether a backward pass follows.
        max_neurons: bound on the neurons of all rows, which those of the pairs alone must keep. Experts are not
            batched where padding rows would exceed it.
    """
    groups = [Group(i, 1, rows, size) for i, (rows, size) in enumerate(zip(rows_per_expert, sizes)) if rows * size]
    row_of_pair = None
    if hidden_states.device.type == "cpu":
        is_slow = training or hidden_states.dtype.itemsize < 4
        call = (_SLOW_CALL if is_slow else _CALL) / hidden_states.shape[1]
        batched, saving = _batch_experts(groups, sizes, call)
        num_pairs = sum(group.num_rows for group in groups)
        if sum(group.total_rows for group in batched) > num_pairs:
            saving -= _COPY_NEURONS * num_pairs
        fits = max_neurons is None or sum(group.num_neurons for group in batched) <= max_neurons
        if saving > 0 and fits:
            groups, row_of_pair = batched, _rows_of_pairs(batched, rows_per_expert)
    return Plan(
        groups,
        _cut_segments(groups, rows_per_expert, hidden_states.device),
        sum(group.total_rows for group in groups),
        sum(group.num_neurons for group in groups),
        row_of_pair,
    )


def _batch_experts(experts: list[Group], sizes: list[int], call: float) -> tuple[list[Group], float]:
    """Batches consecutive experts of one size where that costs less; returns the groups and the cost saved in all.

    An expert without tokens between two others may join their batch with rows of zeros. `call` is what a product costs
    beside its rows and its matrix.
    """
    groups: list[Group] = []
    total_saving = cost = 0.0  # `cost` is that of the last group
    for first, _, rows, size in experts:
        cost_alone = call + (rows + _READ_ROWS) * size
        if groups and groups[-1].size == size:
            last = groups[-1]
            num_experts, num_rows = first + 1 - last.first, max(rows, last.num_rows)
            saving = cost + cost_alone - call - num_experts * (num_rows + _READ_ROWS) * size
            are_consecutive = num_experts == last.num_experts + 1 or set(sizes[last.first : first]) == {size}
            if saving >= 0 and num_experts * num_rows * size <= _SEGMENT_NEURONS and are_consecutive:
                groups[-1] = Group(last.first, num_experts, num_rows, size)
                cost += cost_alone - saving
                total_saving += saving
                continue
        groups.append(Group(first, 1, rows, size))
        cost = cost_alone
    return groups, total_saving


def _rows_of_pairs(groups: list[Group], rows_per_expert: list[int]) -> Tensor:
    """[pairs]: the row of each sorted pair, past the padding rows of the experts before."""
    counts, padding = [], []  # of each expert: its pairs, and the padding rows before them
    row = pair = 0
    for group in groups:
        for count in rows_per_expert[group.experts]:
            counts.append(count)
            padding.append(row - pair)
            row, pair = row + group.num_rows, pair + count
    return torch.arange(pair) + torch.tensor(padding).repeat_interleave(torch.tensor(counts), output_size=pair)


def _cut_segments(groups: list[Group], rows_per_expert: list[int], device: torch.device) -> list[Segment]:
    """As many groups as `_SEGMENT_NEURONS` allows, at least one; an expert above `_PART_NEURONS` in equal parts."""
    factor = 1 if device.type == "cpu" else _ACCELERATOR_FACTOR
    neurons = [group.num_neurons for group in groups]
    row_bounds = [0, *accumulate(group.total_rows for group in groups)]
    pair_bounds = [0, *accumulate(sum(rows_per_expert[group.experts]) for group in groups)]
    segments: list[Segment] = []
    start = 0
    while start < len(groups):
        group, end = groups[start], start + 1
        num_parts = min(-(-neurons[start] // (_PART_NEURONS * factor)), group.num_rows)
        if num_parts > 1 and group.num_experts == 1:
            bounds = [group.num_rows * part // num_parts for part in range(num_parts + 1)]
            for first, last in zip(bounds, bounds[1:]):
                rows = slice(row_bounds[start] + first, row_bounds[start] + last)
                pairs = slice(pair_bounds[start] + first, pair_bounds[start] + last)
                part_of_group = group._replace(num_rows=last - first)
                segments.append(Segment([part_of_group], slice(start, end), rows, pairs, continues=first > 0))
        else:
            room = _SEGMENT_NEURONS * factor - neurons[start]
            while end < len(groups) and neurons[end] <= room:
                room -= neurons[end]
                end += 1
            rows, pairs = slice(row_bounds[start], row_bounds[end]), slice(pair_bounds[start], pair_bounds[end])
            segments.append(Segment(groups[start:end], slice(start, end), rows, pairs, continues=False))
        start = end
    return segments
