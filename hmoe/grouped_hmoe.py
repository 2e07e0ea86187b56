"""The products of experts of different sizes on contiguous slices of the bank of tiles.

There is one product per expert and stage, or one per run of experts of one size where rows are few. The (token, slot)
pairs are sorted by expert once. Gathering, activation and scattering are done for a segment of the
pairs at a time, in buffers that all segments share; the gate and up projections are all that is kept for backward.
Sums have one order, so results are reproducible. On accelerators the host waits for the pairs per expert, once.

Letters in shapes: T tokens, K expert slots per token, E experts, N tiles, g neurons per tile, H hidden size, I expert
    size.
A slot with the id E (or more) is unused: it costs nothing and adds nothing. This file travels with every saved
checkpoint, so it imports only torch and its sibling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan_hmoe import Group, Plan, Segment, make_plan


_aten = torch.ops.aten
# Activations and their derivatives, called as (x, out=) and (gradient, x, grad_input=).
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


def _sort_pairs(top_k_index: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """(token, slot) pairs stably sorted by expert [T * K], and the number of pairs per expert.

    Slots that are unused or of experts without neurons come last and count for no expert.
    """
    num_experts = len(sizes)
    flat = top_k_index.reshape(-1).clamp(max=num_experts)
    if 0 in sizes:
        used = [expert if size else num_experts for expert, size in enumerate(sizes)] + [num_experts]
        flat = torch.tensor(used, device=flat.device)[flat]
    counts = torch.bincount(flat, minlength=num_experts + 1)
    return torch.sort(flat, stable=True).indices, counts.tolist()[:num_experts]


def _matrices(
    bank: Tensor, groups: list[Group], sizes: list[int], transposed: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the contiguous bank: a matrix [I, H] or [2 I, H] per expert of each group; all between the groups."""
    rows = bank.flatten(0, 1)
    factor = len(rows) // max(sum(sizes), 1)
    lengths, expert = [], 0
    for group in groups:
        lengths += [factor * sum(sizes[expert : group.first]), factor * group.num_experts * group.size]
        expert = group.first + group.num_experts
    lengths.append(factor * sum(sizes[expert:]))
    parts = rows.t().split(lengths, dim=1) if transposed else rows.split(lengths)
    matrices = list(parts[1::2])
    for i, group in enumerate(groups):
        if group.num_experts > 1:
            height = factor * group.size
            matrices[i] = (
                matrices[i].unflatten(1, (-1, height)).transpose(0, 1)
                if transposed
                else matrices[i].unflatten(0, (-1, height))
            )
    return matrices, [part for part in parts[::2] if len(part)]


def _rows_of(flat: Tensor, groups: list[Group], factor: int) -> list[Tensor]:
    """The rows of each group, `factor` times its size wide, which lie one after the other in a flat tensor."""
    shapes = [group.shape(group.num_rows, factor * group.size) for group in groups]
    if len(shapes) == 1:
        return [flat.view(shapes[0])]
    return [part.view(shape) for part, shape in zip(flat.split(list(map(math.prod, shapes))), shapes)]


def _split_rows(rows: Tensor, groups: list[Group]) -> list[Tensor]:
    """The rows [rows, H] of each group."""
    parts = rows.split([group.total_rows for group in groups])
    return [
        part if group.num_experts == 1 else part.view(group.shape(group.num_rows, rows.shape[1]))
        for part, group in zip(parts, groups)
    ]


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    (torch.mm if out.dim() == 2 else torch.bmm)(left, right, out=out)


def _with_zero_row(rows: Tensor, plan: Plan) -> Tensor:
    return rows if plan.row_of_pair is None else torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _of_pairs(rows: Tensor, plan: Plan, segment: Segment) -> Tensor:
    """The rows of a segment that are not made up."""
    if plan.row_of_pair is None or not segment.has_made_up_rows:
        return rows
    return rows.index_select(0, plan.row_of_pair[segment.pairs] - segment.rows.start)


def _by_row(of_pairs: Tensor, plan: Plan, missing: int) -> Tensor:
    """[rows] of something that each sorted pair has, `missing` in rows of zeros."""
    if plan.row_of_pair is None:
        return of_pairs[: plan.num_rows]
    return of_pairs.new_full((plan.num_rows,), missing).index_copy_(
        0, plan.row_of_pair, of_pairs[: len(plan.row_of_pair)]
    )


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


def _forward(
    output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
    saved_numel: int,
) -> tuple[Tensor, Tensor, list[int]]:
    """Adds to `output`; returns what the op returns beside it, with a list of the pairs per expert."""
    act, tile, hidden = ACTIVATIONS[activation][0], down_proj.shape[1], hidden_states.shape[1]
    sizes = _sizes(tile_offsets, tile)
    order, rows_per_expert = _sort_pairs(top_k_index, sizes)
    max_neurons = saved_numel // 2 if saved_numel > 0 else None
    plan = make_plan(rows_per_expert, sizes, hidden_states, training=saved_numel != 0, max_neurons=max_neurons)
    gate_up_of = _matrices(gate_up_proj, plan.groups, sizes, transposed=True)[0]
    down_of = _matrices(down_proj, plan.groups, sizes)[0]
    saved = hidden_states.new_empty(2 * plan.num_neurons if saved_numel < 0 else saved_numel)

    token_of_pair = order // top_k_index.shape[1]
    token_of_row = _by_row(token_of_pair, plan, missing=len(hidden_states))
    weights = top_k_weights.reshape(-1).index_select(0, order).to(output.dtype).unsqueeze(1)  # [T * K, 1]
    inputs_of_token = _with_zero_row(hidden_states, plan)
    # One buffer of each kind for all segments: fresh memory costs a CPU more than the arithmetic on it.
    most_neurons, most_rows = _largest(plan.segments)
    projected_buffer = saved if saved_numel else hidden_states.new_empty(2 * most_neurons)
    neurons_buffer = hidden_states.new_empty(most_neurons)
    inputs_buffer, output_buffer = (hidden_states.new_empty(most_rows, hidden) for _ in range(2))
    saved_start = 0
    for segment in plan.segments:
        groups, num_rows, num_neurons = segment.groups, segment.num_rows, segment.num_neurons
        projected = projected_buffer[saved_start : saved_start + 2 * num_neurons]
        saved_start += 2 * num_neurons if saved_numel else 0
        inputs = torch.index_select(inputs_of_token, 0, token_of_row[segment.rows], out=inputs_buffer[:num_rows])
        for matrix, rows, out in zip(
            gate_up_of[segment.in_plan], _split_rows(inputs, groups), _rows_of(projected, groups, 2)
        ):
            _multiply(rows, matrix, out)  # [rows, 2 I]
        gate, up = projected.view(-1, 2, tile).unbind(1)  # [tiles of all rows, g] each
        neurons = _activate(act, gate, neurons_buffer[:num_neurons].view(-1, tile)).mul_(up).view(-1)
        expert_output = output_buffer[:num_rows]  # [rows, H]
        for matrix, rows, out in zip(
            down_of[segment.in_plan], _rows_of(neurons, groups, 1), _split_rows(expert_output, groups)
        ):
            _multiply(rows, matrix, out)
        weighted = _of_pairs(expert_output, plan, segment).to(output.dtype).mul_(weights[segment.pairs])
        _add_rows(output, token_of_pair[segment.pairs], weighted, [group.num_rows for group in groups])
    return saved, order, rows_per_expert


def _sizes(tile_offsets: list[int], tile: int) -> list[int]:
    return [tile * (end - start) for start, end in zip(tile_offsets, tile_offsets[1:])]


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


def _decode(
    output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
) -> None:
    """Adds the experts of a few tokens to `output`, with as few operations as can be.

    Nothing but the products is done expert by expert, and the pairs are sorted in Python: reading the weights of the
    experts is all that should take time.
    """
    act, tile = ACTIVATIONS[activation][0], down_proj.shape[1]
    num_experts, num_slots, ids = len(tile_offsets) - 1, top_k_index.shape[1], top_k_index.flatten().tolist()
    order = sorted((pair for pair, expert in enumerate(ids) if expert < num_experts), key=ids.__getitem__)
    if not order:
        return
    counts: dict[int, int] = {}
    for pair in order:
        counts[ids[pair]] = counts.get(ids[pair], 0) + 1
    num_rows = list(counts.values())
    bounds = [(tile_offsets[expert] * tile, tile_offsets[expert + 1] * tile) for expert in counts]
    num_neurons = [rows * (end - start) for rows, (start, end) in zip(num_rows, bounds)]
    # What can be done before the products is: once they have streamed weights through the cache, calls cost more.
    gate_up_rows, down_rows = gate_up_proj.flatten(0, 1), down_proj.flatten(0, 1)
    gate_up_matrices = [gate_up_rows[2 * start : 2 * end] for start, end in bounds]  # [2 I, H] each
    down_matrices = [down_rows[start:end] for start, end in bounds]  # [I, H] each
    neurons = hidden_states.new_empty(sum(num_neurons))
    neurons_of = [part.view(rows, -1) for part, rows in zip(neurons.split(num_neurons), num_rows)]
    if len(hidden_states) > 1:
        indices = torch.tensor(order + [pair // num_slots for pair in order], device=hidden_states.device)
        pairs, token = indices.chunk(2)
        inputs = hidden_states.index_select(0, token).split(num_rows)
        weights = top_k_weights.reshape(-1).index_select(0, pairs).to(output.dtype).unsqueeze(1)  # [pairs, 1]
    else:
        inputs = [hidden_states.expand(rows, -1) if rows > 1 else hidden_states for rows in num_rows]
        weights = top_k_weights[:, order].to(output.dtype)  # [1, pairs]

    projected = torch.cat([_project_up(rows, matrix) for rows, matrix in zip(inputs, gate_up_matrices)])
    gate, up = projected.view(-1, 2, tile).unbind(1)  # [tiles of all rows, g] each
    _activate(act, gate, neurons.view(-1, tile)).mul_(up)
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
    output = _zeros_to_accumulate(hidden_states)
    saved, order, rows_per_expert = _forward(
        output,
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up_proj,
        down_proj,
        tile_offsets,
        activation,
        saved_numel,
    )
    counts = torch.tensor(rows_per_expert, dtype=torch.int64)
    return output.to(hidden_states.dtype, copy=False), saved, order, counts


@torch.library.custom_op(f"{_OP_NAMESPACE}::gated_experts_backward", mutates_args=())
def _gated_experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    saved: Tensor,
    order: Tensor,
    counts: Tensor,
    tile_offsets: list[int],
    activation: str,
    bank_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, routing weights, `gate_up_proj` and `down_proj` (the banks' empty unless asked)."""
    act, act_backward = ACTIVATIONS[activation]
    tile, hidden, rows_per_expert = down_proj.shape[1], hidden_states.shape[1], counts.tolist()
    grad_hidden = _zeros_to_accumulate(hidden_states)
    grad_gate_up = torch.empty_like(gate_up_proj) if bank_gradients else gate_up_proj.new_empty(0)
    grad_down = torch.empty_like(down_proj) if bank_gradients else down_proj.new_empty(0)
    sizes = _sizes(tile_offsets, tile)
    plan = make_plan(rows_per_expert, sizes, hidden_states, training=True, max_neurons=saved.numel() // 2)
    gate_up_of = _matrices(gate_up_proj, plan.groups, sizes)[0]
    down_of = _matrices(down_proj, plan.groups, sizes, transposed=True)[0]
    if bank_gradients:
        (grad_gate_up_of, unused), (grad_down_of, also_unused) = (
            _matrices(bank, plan.groups, sizes) for bank in (grad_gate_up, grad_down)
        )
        for gradient in (*unused, *also_unused):
            gradient.zero_()
    token_of_pair = order // top_k_weights.shape[1]
    token_of_row = _by_row(token_of_pair, plan, missing=len(hidden_states))
    weights = top_k_weights.reshape(-1).index_select(0, order).to(hidden_states.dtype)
    weight_of_row = _by_row(weights, plan, missing=0).unsqueeze(1)  # [rows, 1]
    grad_weights_of_row = torch.zeros(plan.num_rows, dtype=grad_hidden.dtype, device=order.device)
    inputs_of_token, grad_of_token = _with_zero_row(hidden_states, plan), _with_zero_row(grad_output, plan)

    most_neurons, most_rows = _largest(plan.segments)
    grad_projected_buffer = saved.new_empty(2 * most_neurons)
    grad_neurons_buffer, activated_buffer, neurons_buffer = (saved.new_empty(most_neurons) for _ in range(3))
    inputs_buffer, rows_buffer = (hidden_states.new_empty(most_rows, hidden) for _ in range(2))
    saved_start = 0
    for segment in plan.segments:
        groups, num_rows, num_neurons = segment.groups, segment.num_rows, segment.num_neurons
        token, in_plan = token_of_row[segment.rows], segment.in_plan
        gate, up = saved[saved_start : saved_start + 2 * num_neurons].view(-1, 2, tile).unbind(1)  # [tiles of rows, g]
        saved_start += 2 * num_neurons

        grad_rows = _split_rows(torch.index_select(grad_of_token, 0, token, out=rows_buffer[:num_rows]), groups)
        grad_neurons = grad_neurons_buffer[:num_neurons].view(-1, tile)  # without the routing weight at first
        for matrix, rows, out in zip(down_of[in_plan], grad_rows, _rows_of(grad_neurons.view(-1), groups, 1)):
            _multiply(rows, matrix, out)  # [rows, I]

        activated = _activate(act, gate, activated_buffer[:num_neurons].view(-1, tile))
        neurons = torch.mul(activated, up, out=neurons_buffer[:num_neurons].view(-1, tile))
        products = torch.mul(neurons, grad_neurons, out=grad_projected_buffer[:num_neurons].view(-1, tile))
        if len(groups) == 1:
            by_row = [tensor.view(num_rows, -1) for tensor in (products, neurons, grad_neurons)]
            torch.sum(by_row[0], 1, dtype=grad_hidden.dtype, out=grad_weights_of_row[segment.rows])
            weight = weight_of_row[segment.rows]  # [rows, 1]
        else:
            by_row = [tensor.view(-1) for tensor in (products, neurons, grad_neurons)]
            # Neurons of each row: made on the CPU, or a GPU would be waited for.
            rows_of_group = torch.tensor([group.total_rows for group in groups])
            lengths = torch.tensor([group.size for group in groups]).repeat_interleave(rows_of_group).to(order.device)
            grad_weights_of_row[segment.rows] = torch.segment_reduce(
                by_row[0].to(grad_hidden.dtype), "sum", lengths=lengths, unsafe=True
            )
            weight = weight_of_row[segment.rows, 0].repeat_interleave(lengths, output_size=num_neurons)
        for tensor in by_row[1:]:
            tensor.mul_(weight)
        grad_projected = grad_projected_buffer[: 2 * num_neurons]
        grad_gate, grad_up = grad_projected.view(-1, 2, tile).unbind(1)
        torch.mul(grad_neurons, activated, out=grad_up)
        grad_gate.copy_(act_backward(grad_neurons.mul_(up), gate, grad_input=grad_neurons))

        grad_projected_of = _rows_of(grad_projected, groups, 2)
        if bank_gradients:
            inputs = torch.index_select(inputs_of_token, 0, token, out=inputs_buffer[:num_rows])
            for grad_of, left_of, right_of in (
                (grad_down_of, _rows_of(neurons.view(-1), groups, 1), grad_rows),
                (grad_gate_up_of, grad_projected_of, _split_rows(inputs, groups)),
            ):
                for grad, left, right in zip(grad_of[in_plan], left_of, right_of):
                    if segment.continues:
                        grad.addmm_(left.mT, right)
                    else:
                        _multiply(left.mT, right, grad)
            for grads in (grad_down_of[in_plan], grad_gate_up_of[in_plan]):
                for grad, group in zip(grads, groups):
                    for expert, rows in enumerate(rows_per_expert[group.experts]):
                        if rows == 0:
                            grad[expert].zero_()  # whatever its weights are
        grad_tokens = rows_buffer[:num_rows]  # [rows, H]
        for matrix, rows, out in zip(gate_up_of[in_plan], grad_projected_of, _split_rows(grad_tokens, groups)):
            _multiply(rows, matrix, out)
        grad_of_pairs = _of_pairs(grad_tokens, plan, segment).to(grad_hidden.dtype)
        _add_rows(grad_hidden, token_of_pair[segment.pairs], grad_of_pairs, [group.num_rows for group in groups])
    grad_weights = torch.empty_like(top_k_weights, memory_format=torch.contiguous_format)
    # Slots that no expert used come last in the order.
    used = sum(rows_per_expert)
    if used < len(order):
        grad_weights.zero_()
    if plan.row_of_pair is not None:
        grad_weights_of_row = grad_weights_of_row.index_select(0, plan.row_of_pair)
    grad_weights.view(-1).index_copy_(0, order[:used], grad_weights_of_row.to(grad_weights.dtype))
    return grad_hidden.to(hidden_states.dtype, copy=False), grad_weights, grad_gate_up, grad_down


@_gated_experts.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, tile_offsets, activation, saved_numel):
    numel = torch.library.get_ctx().new_dynamic_size() if saved_numel < 0 else saved_numel
    order = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64)
    counts = torch.empty(len(tile_offsets) - 1, dtype=torch.int64, device="cpu")
    return torch.empty_like(hidden_states), hidden_states.new_empty(numel), order, counts


@_gated_experts_backward.register_fake
def _(
    grad_output,
    hidden_states,
    top_k_weights,
    gate_up_proj,
    down_proj,
    saved,
    order,
    counts,
    tile_offsets,
    activation,
    bank_gradients,
):
    banks = [torch.empty_like(bank) if bank_gradients else bank.new_empty(0) for bank in (gate_up_proj, down_proj)]
    return torch.empty_like(hidden_states), torch.empty_like(top_k_weights), *banks


def _save_for_backward(ctx, inputs, output):
    hidden_states, _, top_k_weights, gate_up_proj, down_proj, ctx.tile_offsets, ctx.activation, _ = inputs
    _, saved, order, counts = output
    ctx.mark_non_differentiable(saved, order, counts)
    ctx.set_materialize_grads(False)  # else zeros as large as what was saved
    ctx.save_for_backward(hidden_states, top_k_weights, gate_up_proj, down_proj, saved, order, counts)


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 8
    banks_need_gradients = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grad_hidden, grad_weights, grad_gate_up, grad_down = _gated_experts_backward(
        grad_output.contiguous(), *ctx.saved_tensors, ctx.tile_offsets, ctx.activation, banks_need_gradients
    )
    if not banks_need_gradients:
        grad_gate_up = grad_down = None
    return grad_hidden, None, grad_weights, grad_gate_up, grad_down, None, None, None


_gated_experts.register_autograd(_backward, setup_context=_save_for_backward)


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
    inputs = hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    is_plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in inputs)
    if differentiable or torch.compiler.is_compiling() or not is_plain:
        saved_numel = 0
        if differentiable:
            # A token activates an expert at most once, so its K widest experts bound what it keeps.
            widest = sum(sorted(_sizes(tile_offsets, down_proj.shape[1]), reverse=True)[: top_k_index.shape[1]])
            saved_numel = 2 * widest * hidden_states.shape[0] if torch.compiler.is_compiling() else -1
        return _gated_experts(*inputs, tile_offsets, activation, saved_numel)[0]
    output = _zeros_to_accumulate(hidden_states)
    with torch.inference_mode():  # views and calls cost less; `output` itself stays an ordinary tensor
        if top_k_index.numel() <= _DECODING_PAIRS:
            _decode(output, *inputs, tile_offsets, activation)
        else:
            _forward(output, *inputs, tile_offsets, activation, saved_numel=0)
    return output.to(hidden_states.dtype)
