"""Triton kernels for experts of different sizes: one launch per stage for all experts, no padding, no gathered copies.

The layer is the one of `experts_hmoe.py`: a bank of tiles, expert e being the tiles tile_offsets[e] .. [e + 1].

    gate_up_proj [N, 2g, H]   the tiles of an expert are one contiguous [2 I, H] matrix
    down_proj    [N, g, H]    and one contiguous [I, H] matrix

Letters in shapes: T tokens, K expert slots per token, P = T * K (token, slot) pairs, E experts, N tiles, g neurons per
    tile, H hidden size, I expert size, M = sum over used pairs of the size of their expert.

The pairs are sorted by expert once. Buffers of neurons hold a row of I numbers per pair, in that order, with no gaps.
Five kernels do all of forward and backward:

    up_kernel              neurons = act(x gate^T) * (x up^T)         x is read by token index
    project_kernel         pair rows = values @ bank                  down projection; gradient of the hidden states
    sum_slots_kernel       token row = sum of its pair rows           in slot order and fp32, so no atomics
    grad_neurons_kernel    grad_output @ down^T, derivative of the activation, gradient of the routing weights
    bank_gradient_kernel   values^T @ token rows                      gradients of both banks

Every program finds its expert in the pair and tile offsets on the device. Grids and buffers are bounded by static
shapes, so nothing is read back to the host, except one number per layer in eager training with Top-P routing.

The launch configurations are estimates for an H100 and were never tuned on a GPU: the kernels are tested in Triton's
interpreter, on CPU tensors, and compiled for compute capability 9.0, no more. So nothing chooses this backend by
itself (`TUNED_DEVICES` is empty).

This file travels with every saved checkpoint, so it imports only torch, its siblings and, where it is installed,
triton.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .grouped_hmoe import register_gradients


try:
    import triton
    import triton.language as tl

    _jit = triton.jit
except ImportError:
    triton = None

    def _jit(kernel):
        return kernel


# Compute capabilities on which the launch configurations were tuned: there the models choose this backend themselves.
TUNED_DEVICES: frozenset[tuple[int, int]] = frozenset()

# The installed package and every checkpoint's copy of this file define the ops: each under a name of its own.
_OP_NAMESPACE = re.sub(r"\W", "_", __name__)


class Launch(NamedTuple):
    """Blocks of a program, and how Triton compiles it.

    Attributes:
        rows: pairs per block (rows of the bank in the gradients of the banks).
        columns: columns of H per block.
        neurons: neurons per block where gate and up are computed together.
        inner: steps of the inner dimension of a product.
        num_warps, num_stages: Triton's compile options.
    """

    rows: int
    columns: int
    neurons: int
    inner: int
    num_warps: int
    num_stages: int


# (bytes per element, size class): estimates from the H100's shared memory and registers, never tuned.
LAUNCHES: dict[tuple[int, str], Launch] = {
    (2, "small"): Launch(rows=16, columns=64, neurons=64, inner=128, num_warps=4, num_stages=4),
    (2, "medium"): Launch(rows=64, columns=128, neurons=64, inner=64, num_warps=4, num_stages=4),
    (2, "large"): Launch(rows=128, columns=128, neurons=64, inner=64, num_warps=8, num_stages=3),
    (4, "small"): Launch(rows=16, columns=32, neurons=32, inner=64, num_warps=4, num_stages=3),
    (4, "medium"): Launch(rows=32, columns=64, neurons=32, inner=32, num_warps=4, num_stages=3),
    (4, "large"): Launch(rows=64, columns=64, neurons=64, inner=32, num_warps=8, num_stages=3),
}


def _launch_for(dtype: torch.dtype, num_pairs: int, num_experts: int) -> Launch:
    """By the pairs of an expert if the load were equal; the real load is known on the device only."""
    rows = num_pairs / num_experts
    size_class = "small" if rows <= 16 else "medium" if rows <= 128 else "large"
    return LAUNCHES[dtype.itemsize, size_class]


def is_tuned() -> bool:
    """Whether the current GPU is one on which the launch configurations were tuned."""
    if triton is None or not TUNED_DEVICES or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() in TUNED_DEVICES


@_jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a @ b in fp32. Triton's interpreter multiplies bf16 bit patterns, so there operands are upcast."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@_jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation, in fp32."""
    if ACTIVATION == "relu":
        value = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # the normal distribution function
        value = gate * share
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        value = gate * share
        slope = share + value * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    else:  # silu, swish
        share = tl.sigmoid(gate)
        value = gate * share
        slope = share * (1 + gate * (1 - share))
    return value, slope


@_jit
def _load_experts(pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Pairs and tiles of every expert, [EXPERTS] each: the next power of two after the number of experts."""
    expert = tl.arange(0, EXPERTS)
    known = expert < NUM_EXPERTS
    pairs = tl.load(pair_offsets_ptr + expert + 1, known, 0) - tl.load(pair_offsets_ptr + expert, known, 0)
    tiles = tl.load(tile_offsets_ptr + expert + 1, known, 0) - tl.load(tile_offsets_ptr + expert, known, 0)
    return expert, pairs, tiles


@_jit
def _find_expert(block, blocks):
    """Expert that block number `block` belongs to, given blocks per expert, and its number within that expert.

    Past the last block the expert is EXPERTS, which no expert has as id.
    """
    ends = tl.cumsum(blocks, 0)
    past = ends <= block
    return tl.sum(past.to(tl.int32), 0), block - tl.max(tl.where(past, ends, 0), 0)


@_jit
def _find_rows(
    block,
    order_ptr,
    pair_offsets_ptr,
    tile_offsets_ptr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which pairs a row block holds.

    Returns:
        expert (>= NUM_EXPERTS past the last block), its first tile and number of tiles; the pairs [ROWS], and which of
        them are the expert's; the place of the first pair's row in a buffer of neurons, in tiles. Tiles are multiplied
        by the constexpr g later, so that the compiler knows how rows are aligned.
    """
    experts, pairs, tiles = _load_experts(pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS)
    expert, block = _find_expert(block, (pairs + ROWS - 1) // ROWS)
    known = expert < NUM_EXPERTS
    first_tile = tl.load(tile_offsets_ptr + expert, known, 0)
    num_tiles = tl.load(tile_offsets_ptr + expert + 1, known, 0) - first_tile
    first_pair = tl.load(pair_offsets_ptr + expert, known, 0) + block * ROWS
    num_pairs = tl.load(pair_offsets_ptr + expert + 1, known, 0) - first_pair
    buffer_tile = tl.sum(tl.where(experts < expert, pairs * tiles, 0), 0) + block * ROWS * num_tiles
    row = tl.arange(0, ROWS)
    live_row = row < num_pairs.to(tl.int32)
    pair = tl.load(order_ptr + first_pair + row, live_row, 0)
    # What may pass 2^31 stays 64 bits wide; indices within a block need not.
    return expert, first_tile, num_tiles.to(tl.int32), pair, live_row, buffer_tile


@_jit
def up_kernel(
    hidden_ptr,  # [T, H]
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    gate_up_ptr,  # [N, 2g, H]
    projected_ptr,  # [2 M] or None
    neurons_ptr,  # [M]
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    INNER: tl.constexpr,
):
    # Column blocks first: neighbouring programs share the tokens, and a wave of programs a few experts.
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    expert, first_tile, num_tiles, pair, live_row, buffer_tile = _find_rows(
        block, order_ptr, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS, ROWS
    )
    width = num_tiles * TILE  # I
    if (expert >= NUM_EXPERTS) | (column_block * NEURONS >= width):
        return
    row = tl.arange(0, ROWS)
    neuron = column_block * NEURONS + tl.arange(0, NEURONS)
    live_neuron = neuron < width
    gate_row = neuron // TILE * (2 * TILE) + neuron % TILE  # of the expert's [2 I, H]; its up row is g further
    inner = tl.arange(0, INNER)
    x_ptr = hidden_ptr + (pair // SLOTS)[:, None] * HIDDEN + inner[None, :]
    weight_ptr = gate_up_ptr + first_tile * (2 * TILE * HIDDEN) + gate_row[None, :] * HIDDEN + inner[:, None]
    gate = tl.zeros((ROWS, NEURONS), tl.float32)
    up = tl.zeros((ROWS, NEURONS), tl.float32)
    for start in range(0, HIDDEN, INNER):
        live = start + inner < HIDDEN
        x = tl.load(x_ptr + start, live_row[:, None] & live[None, :], 0.0)
        gate_weight = tl.load(weight_ptr + start, live[:, None] & live_neuron[None, :], 0.0)
        up_weight = tl.load(weight_ptr + TILE * HIDDEN + start, live[:, None] & live_neuron[None, :], 0.0)
        gate = _dot(x, gate_weight, gate, PRECISION, UPCAST)
        up = _dot(x, up_weight, up, PRECISION, UPCAST)

    dtype = neurons_ptr.dtype.element_ty
    mask = live_row[:, None] & live_neuron[None, :]
    if projected_ptr is not None:
        saved_ptr = projected_ptr + buffer_tile * (2 * TILE) + row[:, None] * (2 * width) + gate_row[None, :]
        tl.store(saved_ptr, gate.to(dtype), mask)
        tl.store(saved_ptr + TILE, up.to(dtype), mask)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(neurons_ptr + buffer_tile * TILE + row[:, None] * width + neuron[None, :], (value * up).to(dtype), mask)


@_jit
def project_kernel(
    values_ptr,  # [M] or [2 M]: rows of an expert's width I, or 2 I
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    bank_ptr,  # [N, g, H] or [N, 2g, H]
    weights_ptr,  # [P] or None
    pair_rows_ptr,  # [P, H], in token and slot order
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,  # rows of the bank per tile: g or 2g
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    expert, first_tile, num_tiles, pair, live_row, buffer_tile = _find_rows(
        block, order_ptr, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS, ROWS
    )
    if expert >= NUM_EXPERTS:
        return
    width = num_tiles * TILE
    row = tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    live_column = column < HIDDEN
    inner = tl.arange(0, INNER)
    value_ptr = values_ptr + buffer_tile * TILE + row[:, None] * width + inner[None, :]
    weight_ptr = bank_ptr + first_tile * (TILE * HIDDEN) + inner[:, None] * HIDDEN + column[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, INNER):
        live = start + inner < width
        value = tl.load(value_ptr + start, live_row[:, None] & live[None, :], 0.0)
        weight = tl.load(weight_ptr + start * HIDDEN, live[:, None] & live_column[None, :], 0.0)
        accumulator = _dot(value, weight, accumulator, PRECISION, UPCAST)
    if weights_ptr is not None:
        accumulator *= tl.load(weights_ptr + pair, live_row, 0.0).to(tl.float32)[:, None]
    tl.store(
        pair_rows_ptr + pair[:, None] * HIDDEN + column[None, :],
        accumulator.to(pair_rows_ptr.dtype.element_ty),
        live_row[:, None] & live_column[None, :],
    )


@_jit
def sum_slots_kernel(
    pair_rows_ptr,  # [P, H]
    index_ptr,  # [P], rows of unused slots were never written
    output_ptr,  # [T, H]
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) // COLUMN_BLOCKS).to(tl.int64)
    column = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    live_column = column < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        used = tl.load(index_ptr + pair) < NUM_EXPERTS
        total += tl.load(pair_rows_ptr + pair * HIDDEN + column, live_column & used, 0.0).to(tl.float32)
    tl.store(output_ptr + token * HIDDEN + column, total.to(output_ptr.dtype.element_ty), live_column)


@_jit
def grad_neurons_kernel(
    grad_output_ptr,  # [T, H]
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    down_ptr,  # [N, g, H]
    weights_ptr,  # [P]
    projected_ptr,  # [2 M]
    grad_projected_ptr,  # [2 M] or None
    weighted_neurons_ptr,  # [M] or None
    weight_parts_ptr,  # [P, COLUMN_BLOCKS] or None: sums over one block of neurons each
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    INNER: tl.constexpr,
):
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    expert, first_tile, num_tiles, pair, live_row, buffer_tile = _find_rows(
        block, order_ptr, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS, ROWS
    )
    width = num_tiles * TILE  # I
    if (expert >= NUM_EXPERTS) | (column_block * NEURONS >= width):
        return
    row = tl.arange(0, ROWS)
    neuron = column_block * NEURONS + tl.arange(0, NEURONS)
    live_neuron = neuron < width
    mask = live_row[:, None] & live_neuron[None, :]
    inner = tl.arange(0, INNER)
    grad_ptr = grad_output_ptr + (pair // SLOTS)[:, None] * HIDDEN + inner[None, :]
    down_row_ptr = down_ptr + first_tile * (TILE * HIDDEN) + neuron[None, :] * HIDDEN + inner[:, None]
    grad_neurons = tl.zeros((ROWS, NEURONS), tl.float32)  # before the routing weight
    if grad_projected_ptr is not None or weight_parts_ptr is not None:
        for start in range(0, HIDDEN, INNER):
            live = start + inner < HIDDEN
            grad = tl.load(grad_ptr + start, live_row[:, None] & live[None, :], 0.0)
            down = tl.load(down_row_ptr + start, live[:, None] & live_neuron[None, :], 0.0)
            grad_neurons = _dot(grad, down, grad_neurons, PRECISION, UPCAST)

    gate_column = neuron // TILE * (2 * TILE) + neuron % TILE  # of a row of 2 I; its up column is g further
    projected_offset = buffer_tile * (2 * TILE) + row[:, None] * (2 * width) + gate_column[None, :]
    gate = tl.load(projected_ptr + projected_offset, mask, 0.0).to(tl.float32)
    up = tl.load(projected_ptr + projected_offset + TILE, mask, 0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    weight = tl.load(weights_ptr + pair, live_row, 0.0).to(tl.float32)[:, None]
    if weight_parts_ptr is not None:
        part = tl.sum(value * up * grad_neurons, 1)
        tl.store(weight_parts_ptr + pair * COLUMN_BLOCKS + column_block, part, live_row)
    if weighted_neurons_ptr is not None:
        tl.store(
            weighted_neurons_ptr + buffer_tile * TILE + row[:, None] * width + neuron[None, :],
            (value * up * weight).to(weighted_neurons_ptr.dtype.element_ty),
            mask,
        )
    if grad_projected_ptr is not None:
        dtype = grad_projected_ptr.dtype.element_ty
        grad_neurons *= weight
        tl.store(grad_projected_ptr + projected_offset, (grad_neurons * up * slope).to(dtype), mask)
        tl.store(grad_projected_ptr + projected_offset + TILE, (grad_neurons * value).to(dtype), mask)


@_jit
def bank_gradient_kernel(
    values_ptr,  # [M] or [2 M]: rows of an expert's width I, or 2 I
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    token_rows_ptr,  # [T, H]
    grad_bank_ptr,  # [N, g, H] or [N, 2g, H]
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,  # rows of the bank per tile: g or 2g
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    # One program per block of the bank sums over all pairs of the expert: deterministic, and zero without pairs.
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    experts, pairs, tiles = _load_experts(pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS)
    expert, row_block = _find_expert(block, (tiles * TILE + ROWS - 1) // ROWS)
    first_tile = tl.load(tile_offsets_ptr + expert)
    width = (tl.load(tile_offsets_ptr + expert + 1) - first_tile) * TILE
    first_pair = tl.load(pair_offsets_ptr + expert)
    num_pairs = (tl.load(pair_offsets_ptr + expert + 1) - first_pair).to(tl.int32)
    buffer_tile = tl.sum(tl.where(experts < expert, pairs * tiles, 0), 0)

    row = row_block * ROWS + tl.arange(0, ROWS)
    live_row = row < width
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    live_column = column < HIDDEN
    inner = tl.arange(0, INNER)
    value_ptr = values_ptr + buffer_tile * TILE + inner[:, None] * width + row[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_pairs, INNER):
        live = start + inner < num_pairs
        token = tl.load(order_ptr + first_pair + start + inner, live, 0) // SLOTS
        value = tl.load(value_ptr + start * width, live[:, None] & live_row[None, :], 0.0)
        token_row = tl.load(
            token_rows_ptr + token[:, None] * HIDDEN + column[None, :], live[:, None] & live_column[None, :], 0.0
        )
        accumulator = _dot(tl.trans(value), token_row, accumulator, PRECISION, UPCAST)
    tl.store(
        grad_bank_ptr + first_tile * (TILE * HIDDEN) + row[:, None] * HIDDEN + column[None, :],
        accumulator.to(grad_bank_ptr.dtype.element_ty),
        live_row[:, None] & live_column[None, :],
    )


# Chosen by TRITON_INTERPRET when triton decorates the kernels: they then run on CPU tensors, slowly.
INTERPRETED = triton is not None and not isinstance(up_kernel, triton.JITFunction)


@lru_cache(maxsize=1024)
def _device_offsets(tile_offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, because a copy from host to device waits for the device."""
    return torch.tensor(tile_offsets, device=device)


class _Layer:
    """The sorted pairs of one call, and what every launch needs to know about the layer."""

    def __init__(
        self, like: Tensor, top_k_index: Tensor, pairs: tuple[Tensor, Tensor], tile_offsets: list[int], tile: int
    ):
        self.hidden_size = like.shape[-1]
        self.tile = tile
        self.tiles = [end - start for start, end in zip(tile_offsets, tile_offsets[1:])]
        num_pairs = top_k_index.numel()
        self.launch = _launch_for(like.dtype, num_pairs, len(self.tiles))
        # No more row blocks than this, however the pairs fall on the experts.
        self.row_blocks = num_pairs // self.launch.rows + min(len(self.tiles), num_pairs)
        self.neuron_blocks = triton.cdiv(max(self.tiles) * tile, self.launch.neurons)
        self.hidden_blocks = triton.cdiv(self.hidden_size, self.launch.columns)
        self.top_k_index, self.num_slots = top_k_index, top_k_index.shape[1]
        self.pairs = *pairs, _device_offsets(tuple(tile_offsets), like.device)
        self.constants = {
            "SLOTS": self.num_slots,
            "HIDDEN": self.hidden_size,
            "NUM_EXPERTS": len(self.tiles),
            "EXPERTS": triton.next_power_of_2(len(self.tiles)),
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "UPCAST": INTERPRETED and like.dtype == torch.bfloat16,
            "ROWS": self.launch.rows,
            "INNER": self.launch.inner,
            "num_warps": self.launch.num_warps,
            "num_stages": self.launch.num_stages,
        }

    def launch_over_neurons(self, kernel, activation: str, token_rows: Tensor, *tensors: Tensor | None) -> None:
        """`up_kernel` or `grad_neurons_kernel`: one program per block of pairs and block of neurons."""
        if self.row_blocks:
            kernel[(self.row_blocks * self.neuron_blocks,)](
                token_rows,
                *self.pairs,
                *tensors,
                COLUMN_BLOCKS=self.neuron_blocks,
                NEURONS=self.launch.neurons,
                TILE=self.tile,
                ACTIVATION=activation,
                **self.constants,
            )

    def launch_over_columns(self, kernel, row_blocks: int, tile: int, values: Tensor, *tensors: Tensor | None) -> None:
        """`project_kernel` or `bank_gradient_kernel`: one program per block of rows and block of columns of H.

        `tile` is the number of the bank's rows per tile, g or 2g.
        """
        kernel[(row_blocks * self.hidden_blocks,)](
            values,
            *self.pairs,
            *tensors,
            COLUMN_BLOCKS=self.hidden_blocks,
            COLUMNS=self.launch.columns,
            TILE=tile,
            **self.constants,
        )

    def project_and_sum(self, values: Tensor, bank: Tensor, weights: Tensor | None) -> Tensor:
        """Sum over a token's experts of values @ bank, times the routing weights if given. Returns [T, H]."""
        # Each pair has a row of its own, rounded once to the model's dtype: half the traffic of fp32, no atomics.
        pair_rows = values.new_empty(self.top_k_index.numel(), self.hidden_size)
        output = values.new_empty(self.top_k_index.shape[0], self.hidden_size)
        if not self.row_blocks:
            return output.zero_()
        self.launch_over_columns(project_kernel, self.row_blocks, bank.shape[1], values, bank, weights, pair_rows)
        columns = min(1024, triton.next_power_of_2(self.hidden_size))
        column_blocks = triton.cdiv(self.hidden_size, columns)
        sum_slots_kernel[(len(output) * column_blocks,)](
            pair_rows,
            self.top_k_index,
            output,
            COLUMN_BLOCKS=column_blocks,
            SLOTS=self.num_slots,
            HIDDEN=self.hidden_size,
            NUM_EXPERTS=len(self.tiles),
            COLUMNS=columns,
        )
        return output

    def bank_gradient(self, values: Tensor, token_rows: Tensor, bank: Tensor) -> Tensor:
        """Per expert values^T @ token_rows, in the shape of the bank; zero for an expert without tokens."""
        gradient = torch.empty_like(bank)
        row_blocks = sum(triton.cdiv(tiles * bank.shape[1], self.launch.rows) for tiles in self.tiles)
        self.launch_over_columns(bank_gradient_kernel, row_blocks, bank.shape[1], values, token_rows, gradient)
        return gradient


def _sort_pairs(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs stably sorted by expert [P], and where each expert's pairs begin [E + 1]; unused slots lie behind."""
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # bincount would wait for the device.
    return order, torch.searchsorted(expert, torch.arange(num_experts + 1, device=expert.device, dtype=expert.dtype))


@torch.library.custom_op(f"{_OP_NAMESPACE}::triton_experts", mutates_args=())
def _triton_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
    saved_numel: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of each token's experts. All tensors are contiguous.

    Args:
        saved_numel: elements of the buffer that keeps the gate and up projections for backward: 0 for none, -1 for
            2 M, for which the host waits, or a bound on 2 M.

    Returns:
        output [T, H]; the buffer; the pairs sorted by expert [P]; where each expert's pairs begin [E + 1].
    """
    order, pair_offsets = _sort_pairs(top_k_index, len(tile_offsets) - 1)
    tile = down_proj.shape[1]
    with torch.cuda.device_of(hidden_states):
        layer = _Layer(hidden_states, top_k_index, (order, pair_offsets), tile_offsets, tile)
        if saved_numel < 0:
            tiles = _device_offsets(tuple(tile_offsets), order.device).diff()
            saved_numel = 2 * tile * int((pair_offsets.diff() * tiles).sum())
        projected = hidden_states.new_empty(saved_numel)
        neurons = hidden_states.new_empty(saved_numel // 2 if saved_numel else max(layer.tiles) * tile * len(order))
        outputs = projected if saved_numel else None, neurons
        layer.launch_over_neurons(up_kernel, activation, hidden_states, gate_up_proj, *outputs)
        output = layer.project_and_sum(neurons, down_proj, top_k_weights)
    return output, projected, order, pair_offsets


@torch.library.custom_op(f"{_OP_NAMESPACE}::triton_experts_backward", mutates_args=())
def _triton_experts_backward(
    grad_output: Tensor, kept: list[Tensor], tile_offsets: list[int], activation: str, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, routing weights, `gate_up_proj` and `down_proj`: each empty unless it is needed.

    Args:
        kept: these four, `top_k_index`, and what `_triton_experts` returned beside its output.
    """
    hidden_states, top_k_weights, gate_up_proj, down_proj, top_k_index, projected, order, pair_offsets = kept
    need_hidden, need_weights, need_gate_up, need_down = needed
    grad_hidden, grad_weights, grad_gate_up, grad_down = (tensor.new_empty(0) for tensor in kept[:4])
    with torch.cuda.device_of(hidden_states):
        layer = _Layer(hidden_states, top_k_index, (order, pair_offsets), tile_offsets, down_proj.shape[1])
        grad_projected = torch.empty_like(projected) if need_hidden or need_gate_up else None
        weighted_neurons = projected.new_empty(projected.numel() // 2) if need_down else None
        weight_parts = None
        if need_weights:  # zero where an expert has fewer blocks, and in unused slots
            weight_parts = projected.new_zeros(len(order), layer.neuron_blocks, dtype=torch.float32)
        inputs, outputs = (down_proj, top_k_weights, projected), (grad_projected, weighted_neurons, weight_parts)
        layer.launch_over_neurons(grad_neurons_kernel, activation, grad_output, *inputs, *outputs)
        if weight_parts is not None:
            grad_weights = weight_parts.sum(1).view_as(top_k_weights).to(top_k_weights.dtype)
        if weighted_neurons is not None:
            grad_down = layer.bank_gradient(weighted_neurons, grad_output, down_proj)
        if grad_projected is not None and need_gate_up:
            grad_gate_up = layer.bank_gradient(grad_projected, hidden_states, gate_up_proj)
        if grad_projected is not None and need_hidden:
            grad_hidden = layer.project_and_sum(grad_projected, gate_up_proj, None)
    return grad_hidden, grad_weights, grad_gate_up, grad_down


@_triton_experts.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, tile_offsets, activation, saved_numel):
    numel = 2 * torch.library.get_ctx().new_dynamic_size() if saved_numel < 0 else saved_numel
    order = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64)
    pair_offsets = top_k_index.new_empty(len(tile_offsets), dtype=torch.int64)
    return torch.empty_like(hidden_states), hidden_states.new_empty(numel), order, pair_offsets


register_gradients(_triton_experts, _triton_experts_backward, kept_inputs=(0, 2, 3, 4, 1))


def _check_usable(device: torch.device, dtype: torch.dtype) -> None:
    other = "or set experts_implementation='grouped_mm'"
    if triton is None:
        raise RuntimeError(f"experts_implementation='triton' needs the package triton: pip install triton, {other}")
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "experts_implementation='triton' got CPU tensors: move the model to a GPU, set TRITON_INTERPRET=1 before "
            f"Python starts (slow, for tests), {other}"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"experts_implementation='triton' computes in float32, bfloat16 or float16, got {dtype}: convert the "
            f"model, {other}"
        )


def triton_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
    count_neurons: bool,
) -> Tensor:
    """Weighted sum of each token's experts, differentiable: `gated_experts` by Triton kernels.

    Products accumulate in fp32 and a token's experts are added in fp32. Every result is a fixed sum in a fixed order:
    two runs are equal bit by bit.

    Args:
        activation: a key of `ACTIVATIONS` in `grouped_hmoe.py`.
        count_neurons: size what is kept for backward by a count, for which the host waits, instead of a bound that
            holds for any ids. It pays where many slots are unused; a compiled graph has the bound always.

    Raises:
        RuntimeError: without triton, on CPU tensors outside Triton's interpreter, in another dtype than float32,
            bfloat16 and float16.
    """
    _check_usable(hidden_states.device, hidden_states.dtype)
    operands = hidden_states, top_k_index.contiguous(), top_k_weights.contiguous(), gate_up_proj, down_proj
    saved_numel = 0
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        most_tiles = max(end - start for start, end in zip(tile_offsets, tile_offsets[1:]))
        is_counted = count_neurons and not torch.compiler.is_compiling()
        saved_numel = -1 if is_counted else 2 * most_tiles * down_proj.shape[1] * top_k_index.numel()
    return _triton_experts(*operands, tile_offsets, activation, saved_numel)[0]
