"""The default backend: one matrix product per expert and stage, on contiguous slices of the bank of tiles.

The (token, slot) pairs are sorted by expert once. `plan_hmoe.py` decides which experts share one batched product and
cuts the pairs into segments; gathering, activation and scattering are done for a segment at a time, in buffers that
all segments share. Only the gate and up projections are kept for backward. Sums have a fixed order, so results are
reproducible. On accelerators the host waits once, for the number of pairs per expert.

Letters in shapes: T tokens, K expert slots per token, E experts, N tiles, g neurons per tile, H hidden size, I expert
    size; pairs: those of used slots; rows: the pairs and, among them, the padding rows of batched experts.
A slot with the id E (or more) is unused: it costs nothing and adds nothing. This file travels with every saved
checkpoint, so it imports only torch and its sibling.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef

from .plan_hmoe import Group, Plan, Segment, make_plan


_aten = torch.ops.aten
# What `grouped_mm` and `triton` know. Functions and derivatives, called as (x, out=) and (gradient, x, grad_input=).
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (_aten.silu.out, _aten.silu_backward.grad_input),
    "gelu": (_aten.gelu.out, _aten.gelu_backward.grad_input),
    "gelu_pytorch_tanh": (
        partial(_aten.gelu.out, approximate="tanh"),
        partial(_aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "relu": (_aten.relu.out, partial(_aten.threshold_backward.grad_input, threshold=0)),
}
ACTIVATIONS["swish"] = ACTIVATIONS["silu"]

# The installed package and every checkpoint's copy of this file define the op: each under a name of its own.
_OP_NAMESPACE = re.sub(r"\W", "_", __name__)

# Up to so many pairs, a forward pass without gradients is a decoding step: see `_decode`.
_DECODING_PAIRS = 128
# A large matrix is read by a few rows in pieces of so many of its own.
_PIECE_UP, _PIECE_DOWN = 64, 32


class _Inputs(NamedTuple):
    """The arguments of `gated_experts`."""

    hidden_states: Tensor  # [T, H]
    top_k_index: Tensor  # [T, K]
    top_k_weights: Tensor  # [T, K]
    gate_up_proj: Tensor  # [N, 2g, H]
    down_proj: Tensor  # [N, g, H]
    tile_offsets: list[int]  # [E + 1]
    activation: str

    @property
    def act(self) -> Callable[..., Tensor]:
        return ACTIVATIONS[self.activation][0]

    @property
    def sizes(self) -> list[int]:
        return _sizes(self.tile_offsets, self.down_proj.shape[1])


class _Kept(NamedTuple):
    """The tensors kept for backward."""

    hidden_states: Tensor  # [T, H]
    top_k_weights: Tensor  # [T, K]
    gate_up_proj: Tensor  # [N, 2g, H]
    down_proj: Tensor  # [N, g, H]
    projected: Tensor  # gate and up projections, segment by segment: [tiles of all rows, 2, g]
    order: Tensor  # [T * K], the (token, slot) pairs sorted by expert, those of unused slots last
    counts: Tensor  # [E], pairs of each expert, on the CPU


def _sizes(tile_offsets: list[int], tile: int) -> list[int]:
    return [tile * (end - start) for start, end in zip(tile_offsets, tile_offsets[1:])]


def _sort_pairs(top_k_index: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """(token, slot) pairs stably sorted by expert [T * K], and the number of pairs of each expert.

    Unused slots, and slots of experts without neurons, are sorted to the end and not counted.
    """
    num_experts = len(sizes)
    flat = top_k_index.reshape(-1).clamp(max=num_experts)
    if 0 in sizes:
        used = [expert if size else num_experts for expert, size in enumerate(sizes)] + [num_experts]
        flat = torch.tensor(used, device=flat.device)[flat]
    counts = torch.bincount(flat, minlength=num_experts + 1)
    return torch.sort(flat, stable=True).indices, counts.tolist()[:num_experts]


def _matrices(bank: Tensor, groups: list[Group], sizes: list[int], transposed: bool = False) -> list[Tensor]:
    """Per group a view of the contiguous bank: [I, H] or [2 I, H], of several experts [experts, I or 2 I, H]."""
    rows = bank.flatten(0, 1)
    factor = len(rows) // max(sum(sizes), 1)  # 2 where a neuron has a gate row and an up row
    lengths, expert = [], 0  # of each group, after the experts between it and the group before
    for group in groups:
        lengths += [factor * sum(sizes[expert : group.first]), factor * group.num_experts * group.size]
        expert = group.first + group.num_experts
    lengths.append(factor * sum(sizes[expert:]))
    dim = 1 if transposed else 0
    matrices = (rows.t() if transposed else rows).split(lengths, dim)[1::2]
    return [
        matrix if group.num_experts == 1 else matrix.unflatten(dim, (group.num_experts, -1)).movedim(dim, 0)
        for matrix, group in zip(matrices, groups)
    ]


def _split_neurons(buffer: Tensor, groups: list[Group], factor: int = 1) -> list[Tensor]:
    """Per group a view of its rows, `factor` times its size wide, which lie one after the other in the buffer."""
    shapes = [group.shape(group.num_rows, factor * group.size) for group in groups]
    if len(shapes) == 1:
        return [buffer.view(shapes[0])]
    return [part.view(shape) for part, shape in zip(buffer.view(-1).split(list(map(math.prod, shapes))), shapes)]


def _split_rows(rows: Tensor, groups: list[Group]) -> list[Tensor]:
    """Per group a view of its rows, H wide."""
    parts = rows.split([group.total_rows for group in groups])
    return [
        part if group.num_experts == 1 else part.view(group.shape(group.num_rows, rows.shape[1]))
        for part, group in zip(parts, groups)
    ]


def _multiply(left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """out = left @ right, group by group."""
    for a, b, product in zip(left, right, out):
        (torch.mm if product.dim() == 2 else torch.bmm)(a, b, out=product)


def _activate(act: Callable[..., Tensor], gate: Tensor, out: Tensor) -> Tensor:
    """act(gate) [n, g] in a contiguous buffer. Short runs are copied together first, or they would not vectorise."""
    return act(gate, out=out) if gate.shape[1] >= 64 else act(out.copy_(gate), out=out)


def _add_rows(output: Tensor, token: Tensor, rows: Tensor, num_rows: list[int]) -> None:
    """output[token] += rows, in a fixed order: a GPU has none within a call, but an expert has a token only once."""
    if output.device.type == "cpu":
        output.index_add_(0, token, rows)
        return
    for tokens_of_expert, rows_of_expert in zip(token.split(num_rows), rows.split(num_rows)):
        output.index_add_(0, tokens_of_expert, rows_of_expert)


def _accumulator_dtype(hidden_states: Tensor) -> torch.dtype:
    """A token's experts are summed in fp32 when the model is in half precision."""
    return torch.promote_types(hidden_states.dtype, torch.float32)


def _zeros_to_accumulate(hidden_states: Tensor) -> Tensor:
    return torch.zeros(hidden_states.shape, dtype=_accumulator_dtype(hidden_states), device=hidden_states.device)


class _Rows:
    """The rows of a plan: what belongs to a pair or token, brought to rows, and rows added up by token."""

    def __init__(self, plan: Plan, order: Tensor, num_tokens: int, num_slots: int):
        self.plan = plan
        self.token_of_pair = order // num_slots  # [T * K]
        self.token_of_row = self.from_pairs(self.token_of_pair, padding=num_tokens)  # [rows]

    def from_pairs(self, values: Tensor, padding: int) -> Tensor:
        """The value of each row [rows], from those of the sorted pairs."""
        row_of_pair = self.plan.row_of_pair
        if row_of_pair is None:
            return values[: self.plan.num_rows]
        rows = values.new_full((self.plan.num_rows,), padding)
        return rows.index_copy_(0, row_of_pair, values[: len(row_of_pair)])

    def to_pairs(self, of_row: Tensor) -> Tensor:
        """The values of the sorted pairs, from those of all rows."""
        return of_row if self.plan.row_of_pair is None else of_row.index_select(0, self.plan.row_of_pair)

    def with_zero_row(self, of_token: Tensor) -> Tensor:
        """[T, H], or [T + 1, H] with the zeros that padding rows are gathered from."""
        if self.plan.row_of_pair is None:
            return of_token
        return torch.cat([of_token, of_token.new_zeros(1, of_token.shape[1])])

    def gather(self, of_token: Tensor, segment: Segment, buffer: Tensor) -> Tensor:
        """The rows of a segment, in the buffer, from `with_zero_row`."""
        return torch.index_select(of_token, 0, self.token_of_row[segment.rows], out=buffer[: segment.num_rows])

    def add_to_tokens(self, output: Tensor, rows: Tensor, segment: Segment, weights: Tensor | None = None) -> None:
        """Adds the rows of a segment, padding rows left out, to [T, H], times the weights of all pairs if given."""
        if segment.has_padding and self.plan.row_of_pair is not None:
            rows = rows.index_select(0, self.plan.row_of_pair[segment.pairs] - segment.rows.start)
        rows = rows.to(output.dtype)
        if weights is not None:
            rows.mul_(weights[segment.pairs])
        _add_rows(output, self.token_of_pair[segment.pairs], rows, [group.num_rows for group in segment.groups])


def _forward(output: Tensor, inputs: _Inputs, saved_numel: int) -> tuple[Tensor, Tensor, list[int]]:
    """Adds to `output`; returns what the op returns beside it, with the pairs of each expert as a list."""
    hidden_states, tile, sizes = inputs.hidden_states, inputs.down_proj.shape[1], inputs.sizes
    order, rows_per_expert = _sort_pairs(inputs.top_k_index, sizes)
    max_neurons = saved_numel // 2 if saved_numel > 0 else None
    plan = make_plan(rows_per_expert, sizes, hidden_states, training=saved_numel != 0, max_neurons=max_neurons)
    gate_up_of = _matrices(inputs.gate_up_proj, plan.groups, sizes, transposed=True)
    down_of = _matrices(inputs.down_proj, plan.groups, sizes)
    saved = hidden_states.new_empty(2 * plan.num_neurons if saved_numel < 0 else saved_numel)

    all_rows = _Rows(plan, order, *inputs.top_k_index.shape)
    weights = inputs.top_k_weights.reshape(-1).index_select(0, order).to(output.dtype).unsqueeze(1)  # [T * K, 1]
    inputs_of_token = all_rows.with_zero_row(hidden_states)
    # One buffer of each kind for all segments: fresh memory costs a CPU more than the arithmetic on it.
    most_neurons, most_rows = _largest(plan.segments)
    projected_buffer = saved if saved_numel else hidden_states.new_empty(2 * most_neurons)
    neurons_buffer = hidden_states.new_empty(most_neurons)
    inputs_buffer, output_buffer = (hidden_states.new_empty(most_rows, hidden_states.shape[1]) for _ in range(2))
    saved_start = 0
    for segment in plan.segments:
        groups, num_neurons = segment.groups, segment.num_neurons
        projected = projected_buffer[saved_start : saved_start + 2 * num_neurons]  # per row [I / g, 2, g]
        saved_start += 2 * num_neurons if saved_numel else 0
        rows = _split_rows(all_rows.gather(inputs_of_token, segment, inputs_buffer), groups)  # [rows, H] each
        _multiply(rows, gate_up_of[segment.in_plan], _split_neurons(projected, groups, 2))
        gate, up = projected.view(-1, 2, tile).unbind(1)  # [tiles of all rows, g] each
        neurons = _activate(inputs.act, gate, neurons_buffer[:num_neurons].view(-1, tile)).mul_(up).view(-1)
        expert_output = output_buffer[: segment.num_rows]  # [rows, H]
        neurons_of = _split_neurons(neurons, groups)  # [rows, I] each
        _multiply(neurons_of, down_of[segment.in_plan], _split_rows(expert_output, groups))
        all_rows.add_to_tokens(output, expert_output, segment, weights)
    return saved, order, rows_per_expert


def _largest(segments: list[Segment]) -> tuple[int, int]:
    """The most neurons and the most rows of a segment."""
    return max((s.num_neurons for s in segments), default=0), max((s.num_rows for s in segments), default=0)


def _project_up(rows: Tensor, matrix: Tensor) -> Tensor:
    """The elements of rows @ matrix.t(), by the fastest of three ways for a few rows on a CPU.

    In fp32 a large matrix is read fastest piece by piece, and at more rows from the left; in half precision, always
    from the left.
    """
    from_left = len(rows) >= 2
    if matrix.dtype in (torch.float32, torch.float64):
        if 4 <= len(rows) < 16 and _is_large(matrix, _PIECE_UP):
            pieces = matrix.unflatten(0, (-1, _PIECE_UP))
            return torch.bmm(rows.expand(len(pieces), -1, -1), pieces.mT).transpose(0, 1).reshape(-1)
        from_left = len(rows) >= 16 and _is_large(matrix)
    return (matrix @ rows.t()).t().reshape(-1) if from_left else F.linear(rows, matrix).view(-1)


def _project_down(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, as a sum over pieces of a large matrix where that is faster for a few rows on a CPU."""
    is_exact = matrix.dtype in (torch.float32, torch.float64)  # sums of half-precision pieces would be rounded
    if is_exact and 2 <= len(rows) <= 6 and _is_large(matrix, _PIECE_DOWN):
        pieces = matrix.unflatten(0, (-1, _PIECE_DOWN))
        return torch.bmm(rows.unflatten(1, (-1, _PIECE_DOWN)).transpose(0, 1), pieces).sum(0)
    return torch.mm(rows, matrix)


def _is_large(matrix: Tensor, piece: int = 1) -> bool:
    """Larger than what a CPU's cache keeps while a few rows are multiplied with it, and made of whole pieces."""
    return matrix.numel() > 1 << 18 and len(matrix) % piece == 0


def _decode(output: Tensor, inputs: _Inputs) -> None:
    """Adds the experts of a few tokens to `output`, with as few operations as can be.

    Nothing but the products is done expert by expert, and the pairs are sorted in Python: reading the weights of the
    experts is all that should take time.
    """
    hidden_states, num_slots, tile = inputs.hidden_states, inputs.top_k_index.shape[1], inputs.down_proj.shape[1]
    ids, num_experts = inputs.top_k_index.flatten().tolist(), len(inputs.tile_offsets) - 1
    order = sorted((pair for pair, expert in enumerate(ids) if expert < num_experts), key=ids.__getitem__)
    if not order:
        return
    counts = Counter(map(ids.__getitem__, order))  # in the order of the experts
    num_rows = list(counts.values())
    bounds = [(inputs.tile_offsets[expert] * tile, inputs.tile_offsets[expert + 1] * tile) for expert in counts]
    num_neurons = [rows * (end - start) for rows, (start, end) in zip(num_rows, bounds)]
    # What can be done before the products is: once they have streamed weights through the cache, calls cost more.
    gate_up_rows, down_rows = inputs.gate_up_proj.flatten(0, 1), inputs.down_proj.flatten(0, 1)
    gate_up_matrices = [gate_up_rows[2 * start : 2 * end] for start, end in bounds]  # [2 I, H] each
    down_matrices = [down_rows[start:end] for start, end in bounds]  # [I, H] each
    neurons = hidden_states.new_empty(sum(num_neurons))
    neurons_of = [part.view(rows, -1) for part, rows in zip(neurons.split(num_neurons), num_rows)]
    if len(hidden_states) > 1:
        indices = torch.tensor(order + [pair // num_slots for pair in order], device=hidden_states.device)
        pairs, token = indices.chunk(2)
        rows_of = hidden_states.index_select(0, token).split(num_rows)
        weights = inputs.top_k_weights.reshape(-1).index_select(0, pairs).to(output.dtype).unsqueeze(1)  # [pairs, 1]
    else:
        rows_of = [hidden_states.expand(rows, -1) if rows > 1 else hidden_states for rows in num_rows]
        weights = inputs.top_k_weights[:, order].to(output.dtype)  # [1, pairs]

    projected = torch.cat([_project_up(rows, matrix) for rows, matrix in zip(rows_of, gate_up_matrices)])
    gate, up = projected.view(-1, 2, tile).unbind(1)  # [tiles of all rows, g] each
    _activate(inputs.act, gate, neurons.view(-1, tile)).mul_(up)
    expert_output = torch.cat([_project_down(rows, matrix) for rows, matrix in zip(neurons_of, down_matrices)])
    expert_output = expert_output.to(output.dtype)  # [pairs, H]
    if len(hidden_states) > 1:
        _add_rows(output, token, expert_output.mul_(weights), num_rows)
    else:
        torch.mm(weights, expert_output, out=output)


@torch.library.custom_op(f"{_OP_NAMESPACE}::gated_experts", mutates_args=())
def _gated_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
    saved_numel: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of each token's experts.

    Args:
        saved_numel: elements of the buffer that keeps the gate and up projections for backward: 0 for none, -1 for
            exactly what is needed (a size that depends on the routing), or a bound on it (a static shape, for the
            compiler).

    Returns:
        output [T, H]; the buffer, experts in order, each [rows, tiles, 2, g]; the (token, slot) pairs sorted by
        expert, unused slots last [T * K]; pairs per expert [E], on the CPU, where backward reads them.
    """
    inputs = _Inputs(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, tile_offsets, activation)
    output = _zeros_to_accumulate(hidden_states)
    saved, order, rows_per_expert = _forward(output, inputs, saved_numel)
    counts = torch.tensor(rows_per_expert, dtype=torch.int64)
    return output.to(hidden_states.dtype, copy=False), saved, order, counts


class _NeuronBuffers(NamedTuple):
    """What backward computes for the neurons of a segment, in memory that all segments share."""

    neurons: Tensor  # [tiles of all rows, g], like the next two
    activated: Tensor
    grad_neurons: Tensor
    grad_projected: Tensor  # [tiles of all rows, 2, g]


def _through_neurons(
    projected: Tensor, weights: Tensor, groups: list[Group], activation: str, buffers: _NeuronBuffers
) -> Tensor:
    """The gradients of gate and up, from those of the neurons.

    Args:
        projected: gate and up projections [tiles of all rows, 2, g].
        weights: routing weights [rows].
        buffers: `grad_neurons` holds the gradients of the neurons before the routing weights; written are `neurons`,
            times the routing weights, and `grad_projected`.

    Returns:
        gradients of the routing weights [rows].
    """
    act, act_backward = ACTIVATIONS[activation]
    gate, up = projected.unbind(1)  # [tiles of all rows, g] each
    grad_gate, grad_up = buffers.grad_projected.unbind(1)
    grad_neurons, activated = buffers.grad_neurons, _activate(act, gate, buffers.activated)
    torch.mul(activated, up, out=buffers.neurons)
    # The products need room for a moment, which `grad_projected` has before it is written.
    room = buffers.grad_projected.view(-1)[: up.numel()].view_as(activated)
    products = torch.mul(buffers.neurons, grad_neurons, out=room)
    grad_weights = _weigh_rows(products, (buffers.neurons, grad_neurons), weights, groups)
    torch.mul(grad_neurons, activated, out=grad_up)
    grad_gate.copy_(act_backward(grad_neurons.mul_(up), gate, grad_input=grad_neurons))
    return grad_weights


def _weigh_rows(products: Tensor, weighted: Sequence[Tensor], weights: Tensor, groups: list[Group]) -> Tensor:
    """Multiplies the rows of neurons in `weighted` by their weights [rows], in place; sums `products` by row."""
    dtype = _accumulator_dtype(products)
    if len(groups) == 1:  # all rows have the same width
        sums = products.view(len(weights), -1).sum(1, dtype=dtype)
        for neurons in weighted:
            neurons.view(len(weights), -1).mul_(weights.unsqueeze(1))
        return sums
    # Neurons of each row: made on the CPU, or a GPU would be waited for.
    rows_of_group = torch.tensor([group.total_rows for group in groups])
    lengths = torch.tensor([group.size for group in groups]).repeat_interleave(rows_of_group).to(weights.device)
    sums = torch.segment_reduce(products.view(-1).to(dtype), "sum", lengths=lengths, unsafe=True)
    weight_of_neuron = weights.repeat_interleave(lengths, output_size=products.numel())
    for neurons in weighted:
        neurons.view(-1).mul_(weight_of_neuron)
    return sums


class _BankGradient:
    """The gradient of a bank, to which every segment adds its products. Empty unless it is needed."""

    def __init__(self, bank: Tensor, groups: list[Group], sizes: list[int], is_needed: bool):
        self.is_needed = is_needed
        self.bank = torch.empty_like(bank) if is_needed else bank.new_empty(0)
        self.of_group = _matrices(self.bank, groups, sizes) if is_needed else []

    def add(self, segment: Segment, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Adds left^T @ right, group by group."""
        gradients, left = self.of_group[segment.in_plan], [rows.mT for rows in left]
        if segment.continues:
            gradients[0].addmm_(left[0], right[0])
        else:
            _multiply(left, right, gradients)

    def zero_idle_experts(self, rows_per_expert: list[int], tile_offsets: list[int]) -> None:
        """Experts without pairs get zeros, also those in a batch: zeros times their weights are NaN if these are."""
        first = 0
        for is_idle, run in groupby(rows_per_expert, key=lambda rows: rows == 0):
            end = first + len(list(run))
            if is_idle:
                self.bank[tile_offsets[first] : tile_offsets[end]].zero_()
            first = end


class _Backward:
    """A backward pass: what its segments share, and the gradients that they add to."""

    def __init__(self, grad_output: Tensor, kept: _Kept, tile_offsets: list[int], activation: str, needed: list[bool]):
        self.kept, self.tile_offsets, self.activation = kept, tile_offsets, activation
        self.rows_per_expert = kept.counts.tolist()
        hidden_states, tile = kept.hidden_states, kept.down_proj.shape[1]
        sizes, max_neurons = _sizes(tile_offsets, tile), kept.projected.numel() // 2
        plan = make_plan(self.rows_per_expert, sizes, hidden_states, training=True, max_neurons=max_neurons)
        self.segments, self.rows = plan.segments, _Rows(plan, kept.order, *kept.top_k_weights.shape)
        self.gate_up_of = _matrices(kept.gate_up_proj, plan.groups, sizes)
        self.down_of = _matrices(kept.down_proj, plan.groups, sizes, transposed=True)
        self.projected = kept.projected.view(-1, 2, tile)
        weights = kept.top_k_weights.reshape(-1).index_select(0, kept.order).to(hidden_states.dtype)
        self.weights = self.rows.from_pairs(weights, padding=0)  # [rows]
        self.inputs_of_token, self.grad_of_token = map(self.rows.with_zero_row, (hidden_states, grad_output))

        self.need_hidden, self.need_weights, need_gate_up, need_down = needed
        self.grad_hidden = _zeros_to_accumulate(hidden_states)
        self.grad_weights = self.grad_hidden.new_zeros(plan.num_rows)
        self.grad_gate_up = _BankGradient(kept.gate_up_proj, plan.groups, sizes, need_gate_up)
        self.grad_down = _BankGradient(kept.down_proj, plan.groups, sizes, need_down)

        most_neurons, most_rows = _largest(plan.segments)
        shapes = [(most_neurons // tile, tile)] * 3 + [(most_neurons // tile, 2, tile)]
        self.buffers = _NeuronBuffers(*(self.projected.new_empty(shape) for shape in shapes))
        self.inputs_buffer, self.rows_buffer = (
            hidden_states.new_empty(most_rows, hidden_states.shape[1]) for _ in range(2)
        )

    def add(self, segment: Segment, projected: Tensor) -> None:
        """Adds the gradients of a segment, whose gate and up projections are given [tiles of all rows, 2, g]."""
        groups, in_plan = segment.groups, segment.in_plan
        buffers = _NeuronBuffers(*(buffer[: len(projected)] for buffer in self.buffers))
        grad_rows = _split_rows(self.rows.gather(self.grad_of_token, segment, self.rows_buffer), groups)
        _multiply(grad_rows, self.down_of[in_plan], _split_neurons(buffers.grad_neurons, groups))
        self.grad_weights[segment.rows] = _through_neurons(
            projected, self.weights[segment.rows], groups, self.activation, buffers
        )
        grad_projected = _split_neurons(buffers.grad_projected, groups, 2)  # [rows, 2 I] each
        if self.grad_down.is_needed:
            self.grad_down.add(segment, _split_neurons(buffers.neurons, groups), grad_rows)
        if self.grad_gate_up.is_needed:
            inputs = self.rows.gather(self.inputs_of_token, segment, self.inputs_buffer)
            self.grad_gate_up.add(segment, grad_projected, _split_rows(inputs, groups))
        if self.need_hidden:
            grad_inputs = self.rows_buffer[: segment.num_rows]  # [rows, H], over the rows of `grad_rows`
            _multiply(grad_projected, self.gate_up_of[in_plan], _split_rows(grad_inputs, groups))
            self.rows.add_to_tokens(self.grad_hidden, grad_inputs, segment)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden_states, top_k_weights, order = self.kept.hidden_states, self.kept.top_k_weights, self.kept.order
        num_tiles = [segment.num_neurons // self.projected.shape[2] for segment in self.segments]
        for segment, projected in zip(self.segments, self.projected[: sum(num_tiles)].split(num_tiles)):
            self.add(segment, projected)
        for gradient in (self.grad_gate_up, self.grad_down):
            if gradient.is_needed:
                gradient.zero_idle_experts(self.rows_per_expert, self.tile_offsets)
        grad_hidden = self.grad_hidden.to(hidden_states.dtype) if self.need_hidden else hidden_states.new_empty(0)
        grad_weights = top_k_weights.new_empty(0)
        if self.need_weights:
            of_pairs = self.rows.to_pairs(self.grad_weights).to(top_k_weights.dtype)
            grad_weights = top_k_weights.new_zeros(top_k_weights.shape)
            grad_weights.view(-1).index_copy_(0, order[: len(of_pairs)], of_pairs)
        return grad_hidden, grad_weights, self.grad_gate_up.bank, self.grad_down.bank


@torch.library.custom_op(f"{_OP_NAMESPACE}::gated_experts_backward", mutates_args=())
def _gated_experts_backward(
    grad_output: Tensor, kept: list[Tensor], tile_offsets: list[int], activation: str, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, routing weights, `gate_up_proj` and `down_proj`: each empty unless it is needed.

    Args:
        kept: the tensors of `_Kept`.
    """
    return _Backward(grad_output, _Kept(*kept), tile_offsets, activation, needed).run()


def register_gradients(op: CustomOpDef, backward_op: CustomOpDef, kept_inputs: Sequence[int]) -> None:
    """Makes `backward_op` the derivative of `op`.

    Args:
        op: takes the arguments of `_gated_experts`; returns the output [T, H], then tensors for backward only.
        backward_op: (gradient of the output, kept tensors, tile offsets, activation, needed) -> the gradients of
            hidden states, routing weights and both banks, each empty unless it is needed.
        kept_inputs: which arguments are kept, beginning with these four; the other results of `op` follow.
    """

    def save_for_backward(ctx, inputs, output):
        *_, ctx.tile_offsets, ctx.activation, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else zeros as large as what was saved
        ctx.save_for_backward(*(inputs[i] for i in kept_inputs), *output[1:])

    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 8
        needed = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
        kept = list(ctx.saved_tensors)
        gradients = backward_op(grad_output.contiguous(), kept, ctx.tile_offsets, ctx.activation, needed)
        hidden, weights, gate_up, down = (value if need else None for value, need in zip(gradients, needed))
        return hidden, None, weights, gate_up, down, None, None, None

    def fake_backward(grad_output, kept, tile_offsets, activation, needed):
        return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(kept, needed))

    op.register_autograd(backward, setup_context=save_for_backward)
    backward_op.register_fake(fake_backward)


@_gated_experts.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, tile_offsets, activation, saved_numel):
    numel = torch.library.get_ctx().new_dynamic_size() if saved_numel < 0 else saved_numel
    order = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64)
    counts = torch.empty(len(tile_offsets) - 1, dtype=torch.int64, device="cpu")
    return torch.empty_like(hidden_states), hidden_states.new_empty(numel), order, counts


register_gradients(_gated_experts, _gated_experts_backward, kept_inputs=(0, 2, 3, 4))


def gated_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
) -> Tensor:
    """Weighted sum of each token's experts, differentiable.

    Args:
        hidden_states: [T, H], of the banks' dtype.
        top_k_index: [T, K], expert ids; E or more is unused.
        top_k_weights: [T, K].
        gate_up_proj: [N, 2g, H], contiguous; the gate rows of a tile, then its up rows.
        down_proj: [N, g, H], contiguous.
        tile_offsets: [E + 1], the first tile of each expert, and N.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, H], of the dtype of `hidden_states`.
    """
    inputs = _Inputs(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, tile_offsets, activation)
    tensors = inputs[:5]
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    is_plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    if differentiable or torch.compiler.is_compiling() or not is_plain:
        saved_numel = 0
        if differentiable:
            # A token activates an expert at most once, so its K widest experts bound what it keeps.
            widest = sum(sorted(inputs.sizes, reverse=True)[: top_k_index.shape[1]])
            saved_numel = 2 * widest * hidden_states.shape[0] if torch.compiler.is_compiling() else -1
        return _gated_experts(*inputs, saved_numel)[0]
    output = _zeros_to_accumulate(hidden_states)
    with torch.inference_mode():  # views and calls cost less; `output` itself stays an ordinary tensor
        if top_k_index.numel() <= _DECODING_PAIRS:
            _decode(output, inputs)
        else:
            _forward(output, inputs, saved_numel=0)
    return output.to(hidden_states.dtype)
